"""What a person reads who hits an error: one line that says what is wrong and what to do, end to end, nothing loaded.

A test or two for each row of the table of errors; the rooms' own tests go through the variants."""

import json
import shutil

import numpy as np
import pytest
import tiny_chat
from fake_hub import FakeHub, Repository, point_library_at
from safetensors.numpy import load_file, save_file

from minillm import LLM, CacheConfig, MinillmError
from minillm.files import own_file
from minillm.memory import available_memory
from minillm.programs import run


@pytest.fixture
def tiny(tmp_path):
    return tiny_chat.make(tmp_path / "tiny")


@pytest.fixture
def fails(capfd):
    """fails(model, *flags) -> the one line on stderr of a run that does not work (status 1, or the one given)."""

    def call(model, *flags, status=1):
        assert run.main(["-m", str(model), "-q", *map(str, flags)]) == status
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("minillm: error: ")
        return err

    return call


def holds(text, *words):
    return all(word in text for word in words)


# Out of memory, or it will be


def test_weights_that_do_not_fit(tiny, fails, monkeypatch):
    monkeypatch.setattr("minillm.ops.numpy_ops.available_memory", lambda: 5000)
    monkeypatch.setattr("minillm.llm.load_weights", None)  # computed before anything is allocated
    needs = "tiny needs 0.00 GiB (weights 0.00 GiB) and 0.00 GiB are free: try "
    for flags, fixes in (
        ([], "--quantize q4_0 or a smaller model"),
        (["--dtype", "float32"], "--quantize q4_0 or --dtype stored or a smaller model"),
        (["--quantize", "q8_0"], "a smaller model"),
    ):
        assert fails(tiny, "x", *flags) == f"minillm: error: {needs}{fixes}\n"


def test_weights_and_a_promised_context_that_do_not_fit(tiny, fails, monkeypatch):
    monkeypatch.setattr("minillm.ops.numpy_ops.available_memory", lambda: 5000)
    monkeypatch.setattr("minillm.llm.load_weights", None)
    said = fails(tiny, "x", "-c", "200")
    assert holds(said, "weights 0.00 GiB, cache 0.00 GiB at 200 tokens, workspace", "-c N", "--kv-budget")


def test_prompt_that_does_not_fit(tiny, fails, monkeypatch):
    free = iter([available_memory(), available_memory(), 5000])  # for the choice of dtype, the weights, the prompt
    monkeypatch.setattr("minillm.ops.numpy_ops.available_memory", lambda: next(free))
    monkeypatch.setattr("minillm.model.Model.layers", None)
    said = fails(tiny, "x")
    assert holds(said, "the prompt needs", "(cache 0.00 GiB at 20 tokens, workspace", "are free", "--kv-budget")


# Blocks at load


def test_quantize_of_what_no_blocks_can_be_made_of(fails, tmp_path, default_model_path):
    said = fails(default_model_path, "x", "--quantize", "q4_0")
    assert holds(said, default_model_path.name, "tensor", "is quantised already (Q", "16- and 32-bit models only")
    narrow = tiny_chat.make(tmp_path / "narrow", hidden_size=48)
    save_file(tiny_chat.weights(tiny_chat.CONFIG | {"hidden_size": 48}, 7), narrow / "model.safetensors")
    said = fails(narrow, "x", "--quantize", "q8_0")
    assert holds(said, "has rows of 48, which are no blocks of 32", "without quantize")


def test_quantize_and_a_dtype(tiny, fails):
    said = fails(tiny, "x", "--quantize", "q8_0", "--dtype", "stored", status=2)
    assert holds(said, "dtype stored and quantize q8_0 exclude each other", "leave one out")


# Gated and private repositories


@pytest.mark.parametrize(
    "refused, words",
    [
        ((401, {"X-Error-Code": "GatedRepo"}), ["o/r is gated", "accept its licence at", "hf auth login", "HF_TOKEN"]),
        ((403, {"X-Error-Code": "GatedRepo"}), ["may not read o/r", "ask for access"]),
        (None, ["no repository o/r", "for a private repository log in with `hf auth login` or set HF_TOKEN"]),
    ],
)
def test_repositories_that_are_not_open(refused, words, fails, tmp_path, monkeypatch):
    with FakeHub() as hub:
        point_library_at(hub.url, tmp_path / "hf", monkeypatch)
        if refused:
            files = {"config.json": b"{}", "model.safetensors": b""}
            hub.repositories["o/r"] = Repository(files, refuse_files=refused)
        assert holds(fails("o/r", "x"), *words)
        assert len(set(hub.requests)) == len(hub.requests)  # nothing is asked for again and again
        hub.shutdown()


# Damaged files


@pytest.fixture
def copy_of(tiny_models, tmp_path):
    return lambda name: shutil.copytree(tiny_models[name], tmp_path / name)


def test_missing_shard(copy_of, fails):
    folder = copy_of("gqa-bf16-shards")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in fails(folder, "x")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
DAMAGE = {
    "missing": lambda tensors: tensors.pop(K_PROJ),
    "stray": lambda tensors: tensors.update({"model.layers.1.self_attn.k_norm.weight": np.ones(8, np.float32)}),
    "misshapen": lambda tensors: tensors.update({K_PROJ: np.ones((16, 31), np.float32)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_are_not_those_of_the_model(damage, tiny, fails):
    change_tensors(tiny, DAMAGE[damage])
    name = "model.layers.1.self_attn.k_norm.weight" if damage == "stray" else K_PROJ
    assert holds(fails(tiny, "x"), name, "tiny")


def test_truncated_file(tiny, fails):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in fails(tiny, "x")


def test_header_that_lies_about_offsets(tiny, fails):
    path = tiny / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    lo, hi = header[K_PROJ]["data_offsets"]
    header[K_PROJ]["data_offsets"] = [lo + 4, hi + 4]
    lying = json.dumps(header).encode().ljust(n)
    path.write_bytes(len(lying).to_bytes(8, "little") + lying + data[8 + n :])
    assert holds(fails(tiny, "x"), "model.safetensors", K_PROJ)


# What is not supported


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            ["architectures", "GPT2LMHeadModel", "LlamaForCausalLM"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ["spiral", "linear", "yarn"]),
        ({"quantization_config": {"quant_method": "hqq"}}, ["quantization_config", "hqq", "a GGUF of it"]),
    ],
)
def test_model_that_is_not_supported(change, words, tmp_path, fails):
    assert holds(fails(tiny_chat.make(tmp_path / "m", **change), "x"), *words)


# Prompts


def test_prompt_longer_than_the_context(tiny, fails, tmp_path):
    said = fails(tiny, "y" * 200, "-c", 150)
    assert holds(said, "prompt has 219 tokens and the context 150", "-c/--ctx-size", "limit is 4096")
    said = fails(tiny, "x", "-c", 5000, status=2)
    assert holds(said, "context 5000 is not in 1..4096", "tiny")


def test_nan_names_its_layer(tiny, fails):
    def poison(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan

    change_tensors(tiny, poison)
    assert holds(fails(tiny, "x"), "NaN or infinity", "layer 1", "fetch the model again")


def test_infinity_is_not_text_either(tiny, fails):
    def blow_up(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"] *= np.float32(3e38)

    change_tensors(tiny, blow_up)
    assert "layer 0" in fails(tiny, "x")  # and no RuntimeWarning of NumPy before it


def test_model_without_a_tokenizer(tiny_models, fails):
    assert holds(fails(tiny_models["tied-head"], "x"), "tied-head has no tokenizer", "tokenizer.json")


# Bad values (all of them: test_run.py)


@pytest.mark.parametrize("flags", [["--kv-budget", "0"], ["--tau", "2"], ["-n", "-5"], ["-f", "absent"]])
def test_bad_values_come_before_the_model(flags, fails):
    fails("absent/model", "x", *flags, status=2)


def test_gpu_that_is_not_there(fails):
    assert holds(fails("absent/model", "x", "--device", "cuda:99", status=2), "--device cpu")


# Session files


@pytest.fixture
def saved(tiny, tmp_path):
    """A session file, and a change to what it says of itself."""
    path = tmp_path / "session"
    assert run.main(["-m", str(tiny), "-q", "-n", "1", "--json", "--prompt-cache", str(path), "x"]) == 0
    return path


def change_identity(path, **change):
    arrays, texts = own_file.read(path, "session", "")
    identity = json.loads(texts["minillm_session"]) | change
    own_file.write(path, arrays, texts | {"minillm_session": json.dumps(identity)})


@pytest.mark.parametrize(
    "change, flags, words",
    [
        ({"version": 0}, [], "version 0 and this is 4"),
        ({"cache dtype": "float16"}, [], "cache dtype 'float16' and this is 'float32'"),
        ({}, ["--quantize", "q8_0"], "quantize None and this is 'q8_0'"),
        ({}, ["--kv-method", "streaming"], "method 'hindsight' and this is 'streaming'"),
        ({}, ["--kv-budget", "0.2"], "budget 0.3 and this is 0.2"),
        ({}, ["--kv-set", "reach=8"], "reach 16 and this is 8"),
    ],
)
def test_session_of_other_settings(change, flags, words, tiny, saved, fails, capfd):
    capfd.readouterr()
    change_identity(saved, **change)
    before = saved.read_bytes()
    said = fails(tiny, "x", "--prompt-cache", saved, *flags)
    assert holds(said, str(saved), f"was saved with {words}", "name another file or delete it")
    assert saved.read_bytes() == before


def test_session_of_another_model(saved, fails, capfd, tmp_path):
    capfd.readouterr()
    other = tiny_chat.make(tmp_path / "other", seed=5)
    said = fails(other, "x", "--prompt-cache", saved)
    assert holds(said, "was saved with weights 'safetensors F32 ", "and this is 'safetensors F32 ")


def test_session_that_is_none(tiny, saved, fails, capfd):
    capfd.readouterr()
    whole = saved.read_bytes()
    for content in (b"", b"my diary", whole[:-1], (tiny / "model.safetensors").read_bytes()):
        saved.write_bytes(content)
        assert "is not a minillm session" in fails(tiny, "x", "--prompt-cache", saved)
        assert saved.read_bytes() == content


DAMAGED_STATES = {
    "no list of what is unread": {"messages": [], "rendered": None},
    "a token of no vocabulary": {"unread": [999999], "messages": [], "rendered": None},
    "a token that is a word": {"unread": ["x"], "messages": [], "rendered": None},
    "messages that are a number": {"unread": [], "messages": 5, "rendered": None},
    "a message without words": {"unread": [], "messages": [{"role": "user"}], "rendered": ""},
    "a text that is a number": {"unread": [], "messages": [], "rendered": 7},
    "a list": [],
}


@pytest.mark.parametrize("damage", DAMAGED_STATES)
def test_session_file_with_a_damaged_state_changes_nothing(damage, tiny, saved):
    arrays, texts = own_file.read(saved, "session", "")
    own_file.write(saved, arrays, texts | {"state": json.dumps(DAMAGED_STATES[damage])})
    with LLM.load(tiny) as llm:
        session = llm.session()
        session.feed("abc")
        session.read()
        session.feed("d")
        before = session.cache.lengths.copy()
        with pytest.raises(MinillmError, match="is damaged .*: delete it and read the prompt again"):
            session.restore(saved)
        assert (session.cache.seen, len(session.unread), session.messages) == (3, 1, [])
        assert (session.cache.lengths == before).all()


def test_session_file_with_tokens_of_another_vocabulary(tiny, saved):
    arrays, texts = own_file.read(saved, "session", "")
    arrays["token_ids"] += 10_000
    own_file.write(saved, arrays, texts)
    with LLM.load(tiny) as llm, pytest.raises(MinillmError, match="is damaged .token id 1"):
        llm.session().restore(saved)


def test_session_that_is_refused_changes_nothing(tiny, saved):
    with LLM.load(tiny, cache=CacheConfig("full")) as llm:
        session = llm.session()
        session.feed("abc")
        session.read()
        with pytest.raises(MinillmError, match="method 'hindsight'"):
            session.restore(saved)
        assert (session.cache.seen, session.unread) == (3, [])
