"""The command line: in this process with a tiny model, and as people start it, in a process or terminal of its own."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_chat
from paths import DATA

from minillm import LLM, CacheConfig, SamplingParams
from minillm.programs import chat, cli, run
from minillm.session import Session

ALICE = DATA / "alice.txt"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_chat.make(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def llm(tiny):
    """The same model through the library."""
    return LLM.load(tiny, cache=CacheConfig("full"))


@pytest.fixture
def minillm(tiny, capfd):
    """minillm(*flags) -> (exit status, stdout, stderr) with the tiny model."""

    def call(*flags, model=tiny):
        status = run.main(["-m", model, *map(str, flags)])
        return (status, *capfd.readouterr())

    return call


@pytest.fixture
def stdin(monkeypatch):
    """stdin(bytes): what is piped in; stdin(None): a terminal."""

    def become(data):
        file = io.TextIOWrapper(io.BytesIO(data or b""))
        file.isatty = lambda: data is None
        monkeypatch.setattr(sys, "stdin", file)

    return become


def user(text):
    return [{"role": "user", "content": text}]


def start(*flags, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "minillm.run", *map(str, flags)], text=True, stderr=subprocess.PIPE, **options
    )


# Arguments


def test_every_flag_arrives():
    flags = "-m owner/name -c 512 --dtype stored --quantize q8_0 --device cpu -t 2 --offline -p hi -sys be"
    flags += " --chat-template chatml -n 7 --temp 0.5 --top-k 3 --top-p 0.8 --min-p 0.1"
    flags += " --presence-penalty 0.3 --frequency-penalty -0.2"
    flags += " --repeat-penalty 1.5 -s 42 --stop a --stop b --ignore-eos --kv-method semanticache --kv-budget 0.25"
    flags += " --kv-window 8 --kv-sinks 2 --kv-recompress 64 --no-display-prompt --kv-set rope=cached"
    flags += " --kv-set chunking=fixed:64 --kv-set log_size=false --json -v -q"
    args = cli.parse(flags.split())
    assert args.params == SamplingParams(7, 0.5, 3, 0.8, 0.1, 1.5, 42, ("a", "b"), True, 0.3, -0.2)
    options = {"rope": "cached", "chunking": "fixed:64", "log_size": False}
    wanted = CacheConfig("semanticache", 0.25, window=8, sinks=2, recompress=64, **options)
    assert args.cache.as_dict() == wanted.as_dict()
    assert (args.model, args.ctx_size, args.dtype, args.device, args.threads) == ("owner/name", 512, "stored", "cpu", 2)
    assert args.quantize == "q8_0"
    assert (args.prompt, args.system, args.chat_template, args.document) == ("hi", "be", "chatml", None)
    assert args.offline and args.no_display_prompt and args.json and args.verbose and args.quiet and not args.raw


@pytest.mark.parametrize(
    "flags, name, value",
    [
        ("--max-tokens 3", "params", SamplingParams(3)),
        ("--n-predict 3", "params", SamplingParams(3)),
        ("--max-new-tokens 3", "params", SamplingParams(3)),
        ("-n -1", "params", SamplingParams(None)),
        ("--temperature 1", "params", SamplingParams(temperature=1.0)),
        ("-hf owner/name:Q4_K_M", "model", "owner/name:Q4_K_M"),
        ("--hf-repo owner/name", "model", "owner/name"),
        ("-no-cnv", "raw", True),
        ("--raw", "raw", True),
        ("--seed 1", "params", SamplingParams(seed=1)),
    ],
)
def test_aliases(flags, name, value):
    assert getattr(cli.parse([*flags.split(), "x"]), name) == value


@pytest.mark.parametrize(
    "flags, budget, tau",
    [
        ("", 0.3, None),
        ("--kv-budget 0.2", 0.2, None),
        ("--kv-budget 1024", 1024, None),
        ("--kv-budget full", None, None),
        ("--tau 0.8", None, 0.8),
        ("--kv-method semanticache --kv-set tau=0.8", None, 0.8),
        ("--kv-method streaming --kv-budget 1.0", 1.0, None),
    ],
)
def test_budget_and_tau(flags, budget, tau):
    cache = cli.parse([*flags.split(), "x"]).cache.as_dict()
    assert (cache["budget"], cache.get("tau")) == (budget, tau)


BAD_VALUES = {
    "-n -5": "max_tokens must be at least 1",
    "-n 0": "at least 1",
    "-n five": "-n/--max-tokens",
    "-c 0": "-c/--ctx-size: must be at least 1",
    "-t 0": "-t/--threads",
    "--temp -1": "temperature must be 0",
    "--temp nan": "temperature must be 0",
    "--temp 1 --top-p 0": "top_p must be in (0, 1]",
    "--temp 1 --min-p 2": "min_p",
    "--temp 1 --top-k -1": "top_k",
    "--top-p 0.9": "--top-p means nothing to greedy decoding",
    "--repeat-penalty 0": "repeat_penalty",
    "--presence-penalty 101": "presence_penalty",
    "--frequency-penalty nan": "frequency_penalty",
    "-s -1": "seed must be 0 or more",
    "--json-schema {} --grammar root::=a": "--json-schema and --grammar each say what the answer must be",
    "--json-schema {": "the JSON schema '{' is no JSON",
    "--json-schema absent.json": "absent.json cannot be read: No such file",
    "--grammar .": "--grammar . cannot be read",
    "--json-schema {} --ignore-eos": "ignore_eos",
    "--stop=": "stop",
    "--tau 2": "tau: 2.0 is not a number from -1 to 1",
    "--tau 0.8 --kv-budget 0.2": "exclude each other",
    "--tau 0.8 --kv-set tau=0.8": "are the same",
    "--tau 0.8 --kv-method streaming": "'streaming' has no option 'tau'",
    "--kv-budget 0": "budget 0 is neither a share in (0, 1], nor a whole number",
    "--kv-budget 1.5": "budget 1.5",
    "--kv-budget -3": "budget -3",
    "--kv-budget nan": "budget nan",
    "--kv-budget half": "'half' is neither a share such as 0.2 or 20%, nor entries a head such as 1024, nor auto",
    "--kv-budget 1": "write full, or at least 2 entries",
    "--kv-method full --kv-budget 0.2": "keeps everything",
    "--kv-method nonsense": "methods: full, semanticache",
    "--kv-window -1": "window: -1",
    "--kv-sinks x": "--kv-sinks",
    "--kv-recompress -1": "recompress: -1",
    "--kv-set rope": "write OPTION=VALUE",
    "--kv-method semanticache --kv-set rope=half": "rope: 'half' is not one of unrotated, cached",
    "--kv-set reach=8 --kv-set reach=8": "given twice",
    "--kv-set window=3": "and neither has an option 'window'; the options of both: asked, threshold, reach,",
    "--kv-set worth=true": "only hindsight has an option 'worth': name that method",
    "--kv-method foresight --kv-set worth=true": "'foresight' has no option 'worth'; its options: asked, threshold,",
    "--kv-method kvzip --kv-set reach=8": "no option 'reach'; its options: group, worth, asked, threshold, positions,",
    "--kv-method full --kv-set reach=8": "'full' has no option 'reach'; its options: none",
    "--kv-budget full --quality 0.9": "a cache budget and quality exclude each other: both say what is kept",
    "--kv-method full --quality 0.9": "cache method 'full' keeps everything: leave the quality out",
    "--kv-method kvzip --quality 0.9": "a quality is kept by method foresight alone",
    "--kv-method semanticache --kv-set delimiters=abc": "delimiters 'abc'",
    "--kv-method semanticache --kv-set chunking=fixed:0": "fixed:N",
    "--dtype int8": "'float32'",
    "--quantize q5_0": "'q8_0'",
    "--device cuda:99": "--device cpu",
    "--device gpu": "auto, cpu, cuda",
    "--chat-template nonsense": "chatml",
    "-p again": "given twice",
    "-p - -f -": "both read stdin",
    "-f absent.txt": "absent.txt cannot be read: No such file",
    "-f .": "-f . cannot be read",
    "--raw -sys be": "--raw",
    "--raw --chat-template chatml": "--raw",
    "--prompt-cache .": "is a folder",
    "--prompt-cache absent/x": "absent is no folder",
    "--kv-bud 0.2": "unrecognized arguments",
    "two words": "wants quotes",
}


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_bad_values_are_refused_before_the_model_loads(flags, minillm, tmp_path, monkeypatch):
    monkeypatch.setattr(LLM, "load", None)
    monkeypatch.chdir(tmp_path)
    text = [] if "-p -" in flags else ["x"]
    status, out, err = minillm(*flags.split(), *text)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("minillm: error: ") and BAD_VALUES[flags] in err


def test_texts_that_are_not_utf8(minillm, tmp_path, stdin, monkeypatch):
    monkeypatch.setattr(LLM, "load", None)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    for flags, words in [
        (["-f", latin], "not UTF-8 text at byte 3"),
        (["-p", "caf\udce9"], "the prompt is not UTF-8"),
        (["-sys", "caf\udce9", "x"], "-sys is not UTF-8"),
        (["--stop", "caf\udce9", "x"], "--stop is not UTF-8"),
    ]:
        status, _, err = minillm(*flags)
        assert (status, err.count("\n")) == (2, 1) and words in err
    stdin(b"\xff")
    status, _, err = minillm()
    assert status == 2 and "stdin is not UTF-8 text at byte 0" in err


def test_no_text_at_all(minillm, tmp_path, stdin, monkeypatch):
    monkeypatch.setattr(LLM, "load", None)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    stdin(b"\n")
    for flags, words in [([], "the prompt is empty"), (["-p", " "], "is empty"), (["-f", empty], "holds no text")]:
        status, _, err = minillm(*flags)
        assert (status, err.count("\n")) == (2, 1) and words in err
    stdin(None)  # would be a chat
    for flag in ("--json", "--raw"):
        status, _, err = minillm(flag)
        assert status == 2 and f"{flag} needs a text" in err


def test_help_and_bad_arguments_load_nothing_heavy():
    script = "import sys; from minillm import run; print(run.main(['-n', '-5']))\n"
    script += "print({'jinja2', 'huggingface_hub', 'gguf', 'tqdm', 'safetensors', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2\nset()\n"


def test_method_list(minillm):
    status, out, err = minillm("--kv-method", "list")
    assert (status, err) == (0, "")
    assert "semanticache" in out and "arXiv 2603.14303" in out and "tau = " in out


def test_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        run.main(["--help"])
    out = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "--prompt-cache FILE" in out and "what is piped in is read as the prompt" in out


# One answer


def test_answer_and_what_is_said_around_it(minillm, llm):
    text = llm.generate(user("what is it"), SamplingParams(40))
    status, out, err = minillm("what is it", "-n", 40, "--kv-budget", "full")
    assert (status, out) == (0, text + "\n")
    first, *_, prompt, generated, cache, memory = err.splitlines()
    assert first.startswith("tiny: 35.10 K parameters, ")
    for words in ("float32, 2 layers x 4/2 heads x 8, context 4096, cpu; memory ", " at full context"):
        assert words in first
    n_prompt = len(llm.encode(user("what is it")))
    assert prompt.split()[:3] == ["prompt", str(n_prompt), "tokens"] and prompt.endswith("(cached 0)")
    assert generated.split()[:3] == ["generated", str(len(text)), "tokens"]
    assert "full, everything kept; " in cache
    assert memory.startswith("memory      peak ")


def test_quiet_says_nothing(minillm):
    status, out, err = minillm("tell me", "-n", 5, "-q")
    assert (status, len(out), err) == (0, 6, "")


@pytest.mark.parametrize("flags", [["-p", "tell me"], ["tell me"], []])
def test_ways_to_give_a_prompt(flags, minillm, llm, stdin):
    stdin(b"tell me\r\n")
    assert (
        minillm(*flags, "-qn", 8, "--kv-budget", "full")[1] == llm.generate(user("tell me"), SamplingParams(8)) + "\n"
    )


def test_prompt_from_stdin_with_a_document(minillm, llm, stdin, tmp_path):
    document = tmp_path / "d.txt"
    document.write_text("\ufeffnews of today\n\n")
    wanted = llm.generate(user("news of today\n\nsum up"), SamplingParams(8)) + "\n"
    stdin(b"sum up\n")
    assert minillm("-p", "-", "-f", document, "-qn", 8, "--kv-budget", "full")[1] == wanted
    stdin(b"news of today\n")
    assert minillm("-p", "sum up", "-f", "-", "-qn", 8, "--kv-budget", "full")[1] == wanted
    stdin(b"not read: -f is a prompt already")
    wanted = llm.generate(user("news of today"), SamplingParams(8)) + "\n"
    assert minillm("-f", document, "-qn", 8, "--kv-budget", "full")[1] == wanted


def test_system_prompt_and_template(minillm, llm, tmp_path):
    wanted = llm.generate([{"role": "system", "content": "be brief"}, *user("why")], SamplingParams(8)) + "\n"
    assert minillm("why", "-sys", "be brief", "-qn", 8, "--kv-budget", "full")[1] == wanted
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    wanted = llm.generate("[why]", SamplingParams(8)) + "\n"
    assert minillm("why", "--chat-template", template, "-qn", 8, "--kv-budget", "full")[1] == wanted


def test_raw_repeats_its_prompt(minillm, llm):
    completion = llm.generate("once", SamplingParams(8))
    flags = ["once", "--raw", "-qn", 8, "--kv-budget", "full"]
    assert minillm(*flags)[1] == "once" + completion + "\n"
    assert minillm(*flags, "--no-display-prompt")[1] == completion + "\n"


def test_model_without_a_chat_template_completes(minillm, llm, tmp_path, stdin):
    bare = str(tiny_chat.make(tmp_path / "bare", template=None))
    assert (
        minillm("once", "-qn", 8, "--kv-budget", "full", model=bare)[1]
        == minillm("once", "--raw", "-qn", 8, "--kv-budget", "full", model=bare)[1]
    )
    status, _, err = minillm("x", "-sys", "be brief", "-q", model=bare)
    assert status == 2 and "no chat template, and -sys needs one" in err
    stdin(None)
    status, _, err = minillm("-q", model=bare)
    assert status == 2 and "no chat template, and a chat needs one" in err


def test_stop_and_ignore_eos(minillm, llm):
    text = llm.generate(user("abc"), SamplingParams(60))
    assert minillm("abc", "--stop", text[3:6], "-q", "--kv-budget", "full")[1] == text[:3] + "\n"
    session = llm.session()
    ended = "".join(piece.text for piece in session.ask("hello", SamplingParams(100)))
    assert session.stats["stop_reason"] == "eos"
    assert ended == llm.generate(user("hello"), SamplingParams(100))
    longer = minillm("hello", "--ignore-eos", "-qn", 100, "--kv-budget", "full")[1]
    assert longer.startswith(ended) and len(longer) > len(ended) + 1


def test_json_schema_and_grammar(minillm, tmp_path):
    """As a text and as a file."""
    schema, grammar = '{"enum": ["cats", "dogs", 17]}', 'root ::= "it is " [a-d]{3}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "grammar.gbnf").write_text(grammar)
    flags = ["x", "-q", "--temp", 1, "-s", 4]
    for given in (schema, tmp_path / "schema.json"):
        assert json.loads(minillm(*flags, "--json-schema", given)[1]) in ("cats", "dogs", 17)
    for given in (grammar, tmp_path / "grammar.gbnf"):
        assert re.fullmatch("it is [a-d]{3}\n", minillm(*flags, "--grammar", given)[1])
    status, _, err = minillm(*flags, "--json-schema", '{"type": "hiccup"}')
    assert status == 2 and err.endswith("cannot be used: Invalid type: hiccup\n")


def test_seed(minillm):
    one, again, other = (minillm("x", "-qn", 20, "--temp", 2, "--top-k", 9, "-s", seed)[1] for seed in (1, 1, 2))
    assert one == again != other


JSON_NAMES = """text stop_reason prompt_tokens cached_tokens generated_tokens load_seconds prompt_seconds
generation_seconds first_token_seconds peak_bytes model device cache""".split()


def test_json(minillm, llm):
    status, out, _ = minillm("tell me", "--json", "-n", 12, "--kv-budget", "full")
    record = json.loads(out)
    assert status == 0 and set(record) == set(JSON_NAMES)
    assert record["text"] == llm.generate(user("tell me"), SamplingParams(12))
    assert (record["stop_reason"], record["generated_tokens"], record["cached_tokens"]) == ("length", 12, 0)
    n = len(llm.encode(user("tell me")))
    assert (record["prompt_tokens"], record["model"], record["device"]) == (n, "tiny", "cpu")
    cache = record["cache"]
    assert set(cache) == set("method budget quality kept entries bytes full_bytes tau threshold".split())
    assert (cache["method"], cache["budget"], cache["kept"], cache["tau"]) == ("full", None, 1.0, None)
    assert cache["quality"] is None
    assert cache["entries"] == 2 * 2 * (n + 11) and cache["bytes"] == cache["full_bytes"] > 0
    seconds = [record[name] for name in JSON_NAMES if name.endswith("seconds")]
    assert all(0 < s < 60 for s in seconds) and record["first_token_seconds"] >= record["prompt_seconds"]


@pytest.mark.parametrize("budget, said", [("0.25", "asked 0.25"), ("200", "asked 200 entries a head"), ("full", "")])
def test_budget_is_kept(budget, said, minillm, tmp_path):
    document = tmp_path / "d.txt"
    document.write_text(ALICE.read_text()[:800])
    status, out, err = minillm("-f", document, "--json", "-n", 1, "--kv-budget", budget)
    record = json.loads(out)
    n, cache = record["prompt_tokens"], record["cache"]
    wanted = {"0.25": n / 4, "200": 200, "full": n}[budget]  # entries a head
    assert n > 800 and abs(cache["kept"] * n - wanted) < 0.5 and said in err
    assert cache["bytes"] <= cache["full_bytes"] * (wanted / n + 32 / n)  # less than one page a head is empty


def test_tau_decides_what_is_kept(minillm, tmp_path):
    document = tmp_path / "d.txt"
    document.write_text(ALICE.read_text()[:800])
    kept = []
    for tau in (0.2, 0.6):
        status, out, err = minillm("-f", document, "--json", "-n", 1, "--tau", tau)
        cache = json.loads(out)["cache"]
        kept.append(cache["kept"])
        assert (cache["tau"], cache["budget"]) == (tau, None) and f"(tau {tau:.2f})" in err
    assert 0 < kept[0] < kept[1] < 1


def test_a_threshold_decides_what_is_kept(minillm, tmp_path):
    document = tmp_path / "d.txt"
    document.write_text(ALICE.read_text()[:800])
    kept = []
    for threshold in (0.05, 0.02):
        status, out, err = minillm("-f", document, "--json", "-n", 1, "--kv-set", f"threshold={threshold}")
        cache = json.loads(out)["cache"]
        kept.append(cache["kept"])
        assert (cache["threshold"], cache["budget"]) == (threshold, None) and f"(threshold {threshold:g})" in err
    assert 0 < kept[0] < kept[1] < 1


@pytest.mark.parametrize("flags", [["--kv-budget", "auto"], ["--quality", "0.9"]])
def test_a_quality_without_a_profile_says_how_to_make_one(flags, minillm):
    status, _, err = minillm("x", "-q", *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert "needs a profile, and tiny has none: make one with python -m minillm.profile, or name a budget" in err


def test_verbose_shows_where_an_error_came_from(minillm, tmp_path):
    status, _, err = minillm("x", "-v", model=str(tmp_path / "absent"))
    assert status == 1 and "Traceback" in err and err.splitlines()[-1].startswith("minillm: error: ")


def test_errors_nobody_thought_of_are_one_line(minillm, monkeypatch):
    monkeypatch.setattr(Session, "stream", lambda *_: 1 / 0)
    status, _, err = minillm("x", "-q")
    assert status == 1 and err == (
        "minillm: error: a bug in minillm: ZeroDivisionError: division by zero; -v shows where, please report it\n"
    )
    monkeypatch.setattr(Session, "stream", lambda *_: bytearray(1 << 60))
    status, _, err = minillm("x", "-q")
    assert status == 1 and err.startswith("minillm: error: out of memory") and err.count("\n") == 1


# Ctrl-C and closed pipes


def press_ctrl_c(monkeypatch, name, nth):
    """SIGINT arrives inside the nth call of a function of the model, where nothing may be left half done."""
    from minillm.model import Model

    function, calls = getattr(Model, name), []

    def pressed(*args, **kwargs):
        calls.append(None)
        if len(calls) == nth:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(Model, name, pressed)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_answer(minillm, llm, monkeypatch):
    text = llm.generate(user("tell me"), SamplingParams(30))
    press_ctrl_c(monkeypatch, "decode", 3)
    status, out, err = minillm("tell me", "--kv-budget", "full")
    assert (status, out) == (130, text[:4] + "\n")
    assert "generated        4 tokens" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    press_ctrl_c(monkeypatch, "decode", 3)
    status, out, _ = minillm("tell me", "--json")
    record = json.loads(out)
    assert (status, record["stop_reason"], record["generated_tokens"]) == (130, "interrupted", 4)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_prompt_is_read(minillm, monkeypatch):
    press_ctrl_c(monkeypatch, "layers", 1)
    status, out, err = minillm("tell me")
    assert (status, out) == (130, "") and err.endswith("interrupted while the prompt was read\n")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_again_does_not_wait(minillm, talk, llm, monkeypatch):
    def hang(*_):
        signal.raise_signal(signal.SIGINT)  # noted
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C did not come through")

    text = llm.generate(user("tell me"), SamplingParams(1))
    monkeypatch.setattr("minillm.programs.terminal.PATIENCE", -1)
    monkeypatch.setattr("minillm.model.Model.decode", hang)
    assert minillm("tell me", "-q", "--kv-budget", "full") == (130, text + "\n", "minillm: interrupted\n")
    status, out, err = talk("tell me", "never asked")
    assert (status, out) == (130, text + "\n") and err.endswith("minillm: interrupted\n")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_model_loads(minillm, monkeypatch):
    monkeypatch.setattr("minillm.llm.open_model", lambda *_: signal.raise_signal(signal.SIGINT))
    assert minillm("x", "-q") == (130, "", "minillm: interrupted\n")


def test_reader_that_has_enough(tiny):
    process = start("-m", tiny, "x", "--ignore-eos", stdout=subprocess.PIPE)
    assert process.stdout.read(5)
    process.stdout.close()
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and err.startswith("tiny: ") and err.count("\n") == 2


# Prompt cache


QUESTIONS = "-n 20 --kv-budget 0.5 --json -q -p".split()


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("  " + ALICE.read_text()[:600] + "\n")
    return path


def test_second_question_reads_only_itself(minillm, tiny, llm, document, tmp_path):
    cache = tmp_path / "c"
    ask = ["-f", document, "--prompt-cache", cache, *QUESTIONS]
    first = json.loads(minillm(*ask, "who is it about")[1])
    assert (first["cached_tokens"], first["prompt_tokens"] > 600) == (0, True)
    saved = cache.read_bytes()
    second = json.loads(minillm(*ask, "where")[1])
    n = len(llm.encode(user(document.read_text().rstrip("\n") + "\n\nwhere")))
    assert second["prompt_tokens"] < 50 and second["cached_tokens"] + second["prompt_tokens"] == n
    assert cache.read_bytes() == saved
    # The same two steps without a file, and with a file of this question's own.
    other = json.loads(minillm("-f", document, "--prompt-cache", tmp_path / "other", *QUESTIONS, "where")[1])
    assert other["text"] == second["text"] and other["cached_tokens"] == 0 and other["cache"] == second["cache"]
    with LLM.load(tiny, cache=CacheConfig(budget=0.5)) as fresh:
        session = fresh.session()
        head, rest = fresh.tokenizer.render_chat(user(document.read_text() + "\n\nwhere")).split("\n\n\nwhere")
        ids = fresh.encode(head)
        session.feed(ids[:-1])
        session.settle()
        session.feed(ids[-1:])
        session.feed("\n\nwhere" + rest)
        assert "".join(piece.text for piece in session.stream(SamplingParams(20))) == second["text"]
    # The document alone, and a later prompt that goes on after it.
    assert json.loads(minillm("-f", document, "--prompt-cache", cache, *QUESTIONS[:-1])[1])["cached_tokens"] > 600


def test_prompt_without_a_document(minillm, tmp_path):
    cache = tmp_path / "c"
    text = "The rabbit-hole went straight on like a tunnel. " * 6
    flags = ["--raw", "--prompt-cache", cache, *QUESTIONS]
    first, again, longer = (json.loads(minillm(*flags, text)[1]) for text in (text, text, text + " And then"))
    assert (first["cached_tokens"], first["prompt_tokens"]) == (0, 288)
    assert (again["cached_tokens"], again["prompt_tokens"]) == (287, 1) and again["text"] == first["text"]
    assert (longer["cached_tokens"], longer["prompt_tokens"]) == (287, 10)
    assert minillm("--raw", "--prompt-cache", tmp_path / "one", *QUESTIONS, "x")[0] == 0  # nothing to read beforehand
    assert json.loads(minillm("--raw", "--prompt-cache", tmp_path / "one", *QUESTIONS, "xy")[1])["prompt_tokens"] == 2


def test_prompt_cache_of_another_text(minillm, document, tmp_path):
    cache = tmp_path / "c"
    assert minillm("-f", document, "--prompt-cache", cache, *QUESTIONS, "who")[0] == 0
    saved = cache.read_bytes()
    document.write_text("Another text.")
    status, out, err = minillm("-f", document, "--prompt-cache", cache, *QUESTIONS, "who")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"{cache} holds another prompt" in err and "name another file, or delete it" in err
    assert cache.read_bytes() == saved


def test_saving_is_all_or_nothing(minillm, tmp_path, monkeypatch):
    def fill_the_disk(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fill_the_disk)
    status, _, err = minillm("why", "-q", "--prompt-cache", tmp_path / "c")
    assert (status, err.count("\n")) == (1, 1) and "cannot write" in err and "No space left" in err
    assert list(tmp_path.iterdir()) == []


# Chat


@pytest.fixture
def talk(minillm, stdin, monkeypatch):
    """talk(*lines, flags) -> (exit status, stdout, stderr) of a chat in which these lines are typed, then Ctrl-D; an
    exception is raised instead of a line."""

    def chatting(*lines, flags=()):
        stdin(None)
        typed = iter(lines)

        def read_line():
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(chat, "_read_line", read_line)
        return minillm("-n", 20, "--kv-budget", "full", *flags)

    return chatting


def prompt_lines(err):
    return [line for line in err.splitlines() if line.startswith("prompt ")]


def test_chat_reads_every_turn_once(talk, llm):
    status, out, err = talk("tell me", "/stats", "", "  more ", "/stats", flags=["-sys", "be brief"])
    session = llm.session()
    answers = []
    counts = []
    for text in ("tell me", "more"):
        answers.append("".join(p.text for p in session.ask(text, SamplingParams(20), "be brief")))
        counts.append((session.timings.prompt_tokens, session.timings.cached_tokens))
    session.close()
    assert (status, out) == (0, "".join(answer + "\n" for answer in answers))
    assert [(int(line.split()[1]), int(line.split()[-1][:-1])) for line in prompt_lines(err)] == counts
    assert counts[1][0] < 50 < counts[1][1]


def test_chat_commands(talk):
    status, out, err = talk("/help", "/stats", "tell me", "/reset", "tell me", "/stats", "/who", "/exit", "unread")
    one, two = out.splitlines()
    assert status == 0 and one == two
    assert "/reset   forget the conversation" in err and "no answer yet; 0 tokens read" in err
    assert "/who is no command" in err and prompt_lines(err)[0].endswith("(cached 0)")


def test_quiet_chat_says_what_it_is_asked_for(talk):
    _, _, err = talk("tell me", "/stats", "/help", flags=["-q"])
    assert err.startswith("\nprompt ") and err.endswith("at the prompt, it leaves\n")


def test_chat_ctrl_c_at_the_prompt(talk):
    status, out, err = talk(KeyboardInterrupt(), "why", KeyboardInterrupt(), KeyboardInterrupt(), "never read")
    assert status == 0 and out.count("\n") == 1 and err.count("Ctrl-C again, Ctrl-D or /exit leaves") == 2


@pytest.mark.usefixtures("ctrl_c")
def test_chat_ctrl_c_in_an_answer_and_in_a_prompt(talk, monkeypatch):
    whole = talk("tell me")[1]
    press_ctrl_c(monkeypatch, "decode", 3)
    status, out, err = talk("tell me", "more", "/stats")
    first, second = out.splitlines()
    assert (status, first) == (0, whole[:4]) and second and "(stopped)" in err
    prompt = prompt_lines(err)[0]
    assert int(prompt.split()[1]) < 50 and int(prompt.split()[-1][:-1]) > 20
    press_ctrl_c(monkeypatch, "layers", 2)
    status, out, err = talk("tell me", "more", "and", "/stats")
    assert (status, out.count("\n")) == (0, 2) and "(stopped)" in err
    prompt = prompt_lines(err)[0].split()  # the question whose reading was left is read again, with the next one
    assert int(prompt[1]) >= 50 and int(prompt[-1][:-1]) > 20


def test_chat_turn_that_is_too_long(talk):
    _, out, err = talk("tell me", "x" * 300, "more", "/stats", flags=["-c", "200"])
    assert out.count("\n") == 2
    assert "minillm: error: the prompt has 3" in err and "/reset forgets the conversation" in err
    assert int(prompt_lines(err)[0].split()[1]) < 50


def test_chat_until_the_context_is_full(talk):
    _, out, err = talk("tell me", flags=["-c", "60", "-n", "-1", "--ignore-eos"])
    assert "the context of 60 tokens is full" in err


def test_chat_is_saved_and_taken_up(talk, minillm, tmp_path):
    whole = talk("tell me", "more")[1]
    path = tmp_path / "chat"
    cache = ["--prompt-cache", path]
    first = talk("tell me", flags=cache)
    assert f"{path}: the chat is saved (" in first[2]
    status, second, err = talk("more", "/stats", flags=cache)
    assert (status, first[1] + second) == (0, whole)
    assert f"{path}: a chat of 1 turn, " in err and int(prompt_lines(err)[0].split()[1]) < 50
    before = path.read_bytes()
    assert talk(flags=cache)[0] == 0  # taken up, and left
    status, _, err = talk(flags=[*cache, "-sys", "be brief"])
    assert status == 1 and "another system prompt" in err
    assert minillm("-q", "--kv-budget", "full", *cache, "-p", "why")[2].startswith(
        f"minillm: error: {path} holds another"
    )
    assert path.stat().st_size == len(before)
    prompt = tmp_path / "prompt"
    minillm("-q", "--kv-budget", "full", "--prompt-cache", prompt, "-n", 1, "-p", "why")
    status, _, err = talk(flags=["--prompt-cache", prompt])
    assert status == 1 and "holds a prompt, not a chat" in err


# At a real terminal


class PseudoTerminal:
    """minillm in a terminal of its own: `type` a line, `wait` for a text."""

    def __init__(self, *flags):
        pty = pytest.importorskip("pty")
        self.seen = ""
        pid, self.fd = pty.fork()
        if not pid:
            plain = os.environ | {"TERM": "dumb"}  # no escape sequences in what is echoed
            os.execve(sys.executable, [sys.executable, "-m", "minillm.run", *map(str, flags)], plain)
        self.pid = pid

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait(self, text, seconds=30):
        """What came up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            came = self._read(end)
            assert came, f"{text!r} did not come: {self.seen!r}"
            self.seen += came
        got, _, self.seen = self.seen.partition(text)
        return got + text

    def _read(self, end):
        """Some output; "" when there is no more, or at the time `end`."""
        if not select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
            return ""
        try:
            return os.read(self.fd, 4096).decode(errors="replace")
        except OSError:  # Linux' way to say that the other side is closed
            return ""

    def leave(self):
        """The exit status, once all output is read."""
        end = time.monotonic() + 60
        while self._read(end):
            pass
        if time.monotonic() > end:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.usefixtures("ctrl_c")
def test_chat_at_a_terminal(tiny):
    terminal = PseudoTerminal("-m", tiny, "--kv-budget", "full", "--ignore-eos", "-n", "300")
    terminal.wait("/help lists the commands")
    terminal.wait("\n> ")
    terminal.type("tell me\n")
    terminal.wait("\n> ")
    terminal.type("more\n")
    terminal.wait("more\r\n")
    time.sleep(0.1)  # some of the answer has come
    terminal.type("\x03")
    terminal.wait("(stopped)")
    terminal.wait("\n> ")
    terminal.type("/stats\n")
    prompt = terminal.wait("memory ")
    (prompt,) = [line for line in prompt.splitlines() if line.startswith("prompt ")]
    assert int(prompt.split()[1]) < 50 and int(prompt.split()[-1][:-1]) > 300
    terminal.wait("\n> ")
    terminal.type("\x1b[A" * 3 if has_readline() else "tell me")  # three lines up in the history
    terminal.wait("tell me")
    terminal.type("\n")
    assert "(stopped)" not in terminal.wait("\n> ")
    time.sleep(0.3)  # a signal between readline's prompt and its waiting for a key would wait for the key
    terminal.type("\x03")
    terminal.wait("Ctrl-C again")
    terminal.wait("\n> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


def has_readline():
    try:
        import readline  # noqa: F401
    except ImportError:
        return False
    return True


def test_progress_bar_at_a_terminal_only(tiny, minillm, monkeypatch):
    monkeypatch.setattr("minillm.programs.terminal.BAR_DELAY", 0)
    assert "reading" not in minillm("tell me", "-n", 1)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "reading" in minillm("tell me", "-n", 1)[2]
    assert "reading" not in minillm("tell me", "-qn", 1)[2]


# The default model


def test_default_model_answers(default_model_path):
    flags = [
        "-m",
        default_model_path,
        "-t",
        1,
        "--json",
        "--kv-budget",
        "full",
        "-n",
        8,
        "What is the capital of France?",
    ]
    process = start(*flags, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    record = json.loads(out)
    assert process.returncode == 0 and "Paris" in record["text"] and record["prompt_tokens"] == 37
    assert "134.52 M parameters" in err and "30 layers x 9/3 heads x 64, context 8192" in err
