"""Methods while they generate: positions in the cache, memory that stays flat, sessions that go on, methods of one's
own."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
from literal import NEEDS, attend, rotated
from oracle import rms_norm
from paths import ROOT
from sequences import Sequence
from small_models import compressor_of, config_of, ids_of, model_of, new_cache

from minillm import LLM, SamplingParams
from minillm.cache import state as cache_state
from minillm.compress.compression import Compression
from minillm.compress.config import CacheConfig
from minillm.compress.methods import METHODS, methods_table
from minillm.compress.one_cut import OneCut
from minillm.compress.reading import extend, recompress
from minillm.errors import MinillmError, UsageError
from minillm.files import own_file

GENERATING = [name for name, method in METHODS.items() if method.generates]


# positions in the cache


class StreamingLLM:
    """Section 3.2 of the paper, literally: keys are cached before RoPE, at every step each takes the position of its
    number in the cache; the first 4 and the newest are kept. float64, one sequence, one token at a time."""

    def __init__(self, model, size):
        self.model, self.size, c = model, size, model.config
        self.stored = [[([], []) for _ in range(c.n_kv_heads)] for _ in range(c.n_layers)]

    def read(self, token):
        """-> logits (vocab,)"""
        c, n = self.model.config, len(self.stored[0][0][0])
        inv_freq = np.float64(c.rope.theta) ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        pos = np.arange(n + 1)
        x = np.float64(self.model.embedding.data[token])
        for w, stored in zip(self.model.blocks, self.stored, strict=True):
            h = rms_norm(x, w.attention_norm, c.rms_eps)
            q, k, v = ((np.float64(m.data) @ h).reshape(-1, c.head_dim) for m in (w.wq, w.wk, w.wv))
            mixed = []
            for head in range(c.n_heads):
                keys, values = stored[head * c.n_kv_heads // c.n_heads]
                if head % (c.n_heads // c.n_kv_heads) == 0:
                    keys.append(k[head * c.n_kv_heads // c.n_heads])
                    values.append(v[head * c.n_kv_heads // c.n_heads])
                here = rotated(np.array(keys), pos[:, None] * inv_freq)
                entries = here, np.array(values), np.zeros(n + 1), pos
                mixed.append(attend(rotated(q[head], n * inv_freq), entries, c.head_dim**-0.5, n))
            x = x + np.float64(w.wo.data) @ np.concatenate(mixed)
            h = rms_norm(x, w.mlp_norm, c.rms_eps)
            gate = np.float64(w.w_gate.data) @ h
            x = x + np.float64(w.w_down.data) @ (gate / (1 + np.exp(-gate)) * (np.float64(w.w_up.data) @ h))
        return np.float64(self.model.head.data) @ rms_norm(x, self.model.norm, c.rms_eps)

    def evict(self):
        for layer in self.stored:
            for keys, values in layer:
                del keys[4 : len(keys) - self.size + 4], values[4 : len(values) - self.size + 4]


def test_streaming_with_positions_in_the_cache_is_streaming_llm():
    model, ids = model_of(config_of()), ids_of(140)
    cache = new_cache(model)
    compressor = compressor_of(model, "streaming", 40, positions="cache", recompress=1)
    literal = StreamingLLM(model, 40)
    logits = model.logits(extend(model, ids, cache, compressor)[-1:])[0]
    for token in ids:
        expected = literal.read(token)
    literal.evict()
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    for token in ids_of(60, 1):
        logits = model.decode([token], [cache])[0]
        if compressor.due(cache):
            recompress(model, cache, compressor)
        np.testing.assert_allclose(logits, literal.read(token), atol=5e-4)
        literal.evict()
        assert cache.position == 40 and (cache.lengths == 40).all()
    assert cache.seen == 200
    for token in ids_of(6, 2):  # a turn reads on from there
        expected = literal.read(token)
    assert np.abs(model.logits(extend(model, ids_of(6, 2), cache, compressor)[-1:])[0] - expected).max() < 5e-4
    assert cache.position == 40 and cache.seen == 206


def test_positions_in_the_cache_do_not_run_out(tmp_path):
    """A context of 256 tokens: with the positions of the text an answer ends there, with those of the cache it goes
    on."""
    params = SamplingParams(max_tokens=250, ignore_eos=True)
    path = tiny_chat.make(tmp_path / "tiny", max_position_embeddings=256)
    for positions, expected in (("original", 256 - 140), ("cache", 250)):
        cache = CacheConfig("streaming", 64, positions=positions, recompress=32)
        with LLM.load(path, cache=cache) as llm:
            session = llm.session()
            session.feed("abcdefg" * 20)
            assert session.seen_soon == 140
            assert len(list(session.stream(params))) == session.timings.generated_tokens == expected
            assert session.answer.stop_reason == "length"
            assert session.cache.position <= (64 + 32 + 32 if positions == "cache" else 256)
            assert int(session.cache.read(0).pos.max()) < session.cache.position


# memory


@pytest.mark.parametrize("method", GENERATING)
def test_memory_is_flat_while_thousands_are_generated(method):
    """With a number of entries as the budget: never more than it, what has come since, and a page a head."""
    config = CacheConfig(method, 64, recompress=64, **NEEDS.get(method, {}))
    sequence = Sequence(config, n_layers=1, n_heads=2, d=4).read(160)
    cache, most, times = sequence.cache, 0, 0
    for compressed in sequence.generate(1000):
        most, times = max(most, cache.entries), times + compressed
        if compressed:
            sequence.check_entries(64)
    assert times >= 1000 / (64 + 256)
    since = 64 + 256 if METHODS[method].settles else 64 + 32  # a chunk that is being written, or the window
    assert most <= 2 * (64 + since)
    assert sequence.pool.bytes_held <= 2 * (64 + since + 2 * 8) * sequence.pool.page_bytes / 8 * 2
    assert cache.left.queries is None or len(cache.left.queries) <= since


@pytest.mark.parametrize("method", GENERATING)
def test_what_is_generated_is_written_twice_at_most(method, monkeypatch):
    """All of it is in memory already: layers whose budgets depend on one another are cut again at the end, and not in
    between."""
    sequence = Sequence(CacheConfig(method, 40, recompress=50, **NEEDS.get(method, {})), n_layers=6).read(140)
    written, times = [], 0
    for kind, name, numbers in ((Compression, "_write", lambda layer, *_: [layer.index]), (OneCut, "_merge", range)):
        write = getattr(kind, name)

        def counted(self, first, second, *rest, write=write, numbers=numbers):
            written.extend(numbers(first, second))
            return write(self, first, second, *rest)

        monkeypatch.setattr(kind, name, counted)
    for compressed in sequence.generate(150):
        times += compressed
        assert max(map(written.count, written), default=0) <= 2 * times and len(set(written)) == 6 * bool(times)
    assert times


# interruptions


@pytest.mark.parametrize("method, at", [("h2o", 0), ("h2o", 1), ("semanticache", 1), ("streaming", 1), ("d2o", 1)])
def test_an_interrupted_recompression_loses_no_token(method, at, tmp_path, monkeypatch):
    """The cache is as it was before, and the token that was drawn comes next."""

    class Interrupted(BaseException):
        pass

    params = SamplingParams(max_tokens=90, ignore_eos=True, temperature=0.0)
    with LLM.load(tiny_chat.make(tmp_path / "tiny"), cache=CacheConfig(method, 60, recompress=25)) as llm:
        session, store = llm.session(), Compression.store
        session.feed("abcdefgh " * 30)
        prompt = list(session.unread)

        def interrupted(compression, index, *arguments, **options):
            if compression.part.generated and index == at:
                raise Interrupted
            store(compression, index, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Compression, "store", interrupted)
            with pytest.raises(Interrupted):
                list(session.stream(params))
        read = prompt + session.answer.token_ids
        assert session.cache.token_ids == read and len(read) > len(prompt) + 20 and len(session.unread) == 1
        assert len(list(session.stream(params))) >= 90 and session.cache.token_ids[: len(read)] == read


# sessions


METHODS_WITH_A_PAST = {"h2o": 60, "d2o": 60, "longflow": 60, "cam": 60, "foresight": 60, "kvzip": 0.4, "streaming": 60}


def run_on(model, cache, compressor, ids):
    logits = []
    for token in ids:
        logits.append(model.decode([token], [cache])[0])
        if compressor.due(cache):
            recompress(model, cache, compressor)
    return np.array(logits)


@pytest.mark.parametrize("method", METHODS_WITH_A_PAST)
def test_a_saved_or_forked_cache_goes_on_as_if_nothing_had_been(method):
    """Scores, queries, thresholds and positions go along: 60 more tokens, compressed twice or more. (Pages lie
    elsewhere, so sums may be rounded otherwise.)"""
    options = {"positions": "cache"} if method == "streaming" else {}
    model = model_of(config_of())
    cache = new_cache(model)
    compressor = compressor_of(model, method, METHODS_WITH_A_PAST[method], recompress=25, **options)
    extend(model, ids_of(150), cache, compressor)
    run_on(model, cache, compressor, ids_of(40, 1))
    other, fork = new_cache(model), cache.fork()
    arrays = cache_state.state(cache)
    compressor.check_left(arrays, 6)
    cache_state.restore(other, arrays)
    expected = run_on(model, cache, compressor, ids_of(60, 2))
    for again in (other, fork):
        np.testing.assert_allclose(run_on(model, again, compressor, ids_of(60, 2)), expected, atol=1e-4)
        for name, array in cache_state.state(cache).items():
            np.testing.assert_allclose(cache_state.state(again)[name], array, rtol=1e-4, atol=1e-5)


DAMAGE = {
    "no scores": ("scores", None),
    "scores cut short": ("scores", lambda s: s[:-1]),
    "scores of fewer tokens than there are queries": ("scores", lambda s: s[:-4]),
    "scores as a table": ("scores", lambda s: s[:, None]),
    "scores that are not finite": ("scores", lambda s: s + np.inf),
    "scores as whole numbers": ("scores", lambda s: s.astype(np.int32)),
    "no queries": ("queries", None),
    "more queries than tokens": ("queries", lambda q: np.concatenate([q, q, q, q])),
    "queries of another head_dim": ("queries", lambda q: q[..., :-1]),
    "queries of more heads": ("queries", lambda q: np.concatenate([q, q], axis=2)),
    "queries of fewer layers": ("queries", lambda q: q[:, :1]),
    "queries that are not finite": ("queries", lambda q: q * np.nan),
    "a threshold too many": ("thresholds", lambda t: np.append(t, 0.5)),
    "a shift beyond the tokens": ("shift", lambda s: s + 999),
    "no shift": ("shift", None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_past_is_refused(damage):
    model = model_of(config_of())
    cache, compressor = new_cache(model), compressor_of(model, "d2o", 60, recompress=25)
    extend(model, ids_of(150), cache, compressor)
    run_on(model, cache, compressor, ids_of(30, 1))
    arrays, (name, change) = cache_state.state(cache), DAMAGE[damage]
    assert {"scores", "queries", "thresholds"} <= arrays.keys() and len(arrays["queries"]) > 3
    if change:
        arrays[name] = change(arrays[name])
    else:
        del arrays[name]
    other = new_cache(model)
    with pytest.raises((MinillmError, ValueError)):
        compressor.check_left(arrays, 6)
        cache_state.restore(other, arrays)
    assert other.entries == other.seen == 0


def test_a_session_file_without_its_scores_is_refused(tmp_path):
    config = CacheConfig("h2o", 60, recompress=25)
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)
    with LLM.load(tiny_chat.make(tmp_path / "tiny"), cache=config) as llm:
        session = llm.session()
        session.feed("abcdefgh " * 30)
        assert len(list(session.stream(params))) >= 60
        path = tmp_path / "session"
        session.save(path)
        other = llm.session()
        other.restore(path)
        assert [piece.token_id for piece in other.stream(params)] == [
            piece.token_id for piece in session.stream(params)
        ]
        arrays, texts = own_file.read(path, "session", "")
        del arrays["scores"]
        own_file.write(path, arrays, texts)
        with pytest.raises(MinillmError, match="is damaged .it lacks scores.: delete it and read the prompt again"):
            llm.session().restore(path)


# methods of one's own


README = ROOT / "README.md"


@pytest.fixture
def own(tmp_path):
    """The README's example, as a file."""
    code = re.search(r"```python\n(# keynorm\.py.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert code.count("\n") <= 30
    path = tmp_path / "keynorm.py"
    path.write_text(code, encoding="utf-8")
    return path


def test_the_readme_s_method_runs(own):
    name = f"{own}:KEYNORM"
    sequence = Sequence(CacheConfig(name, 0.3), n_heads=3).read(400)
    sequence.check_kept(0.3)
    sequence.check_newest(32)
    for layer, head in np.ndindex(2, 3):
        k = np.linalg.norm(np.float64(sequence.k[layer, head]), axis=1)
        n = sequence.cache.lengths[layer, head]
        smallest = 4 + np.argsort(k[4:368], kind="stable")[: n - 36]
        pos = sequence.cache.layer(layer).read(head)[3]
        assert pos.tolist() == [0, 1, 2, 3, *sorted(smallest.tolist()), *range(368, 400)]
    config = CacheConfig(name, 0.3, allocate="global", merge="fold")
    assert CacheConfig(**config.as_dict()).as_dict() == config.as_dict()
    Sequence(config).read(200).check_kept(0.3)


def test_a_method_s_own_options_are_checked(own):
    assert CacheConfig(f"{own}:KEYNORM", power=3).options["power"] == 3.0
    with pytest.raises(UsageError, match="^power: "):
        CacheConfig(f"{own}:KEYNORM", power=-1)
    with pytest.raises(UsageError, match="no option 'pow'; its options: power"):
        CacheConfig(f"{own}:KEYNORM", pow=1)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.py:X", None, "FileNotFoundError"),
        ("own.py:Y", "X = 1", "has no 'Y'"),
        ("own.py:X", "X = 1", "int found, not a minillm.compress.methods.Method"),
        ("own.py:X", "import nothing_like_it", "ModuleNotFoundError.*nothing_like_it"),
        ("own.py:X", "X = (", "SyntaxError"),
        ("own", None, "'own' is unknown; methods: full.*FILE.py:NAME"),
    ],
)
def test_a_method_that_cannot_be_had_is_refused_by_name(name, content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content:
        Path("own.py").write_text(content)
    with pytest.raises(UsageError, match=words):
        CacheConfig(str(tmp_path / name) if ":" in name else name)


def test_a_method_of_another_package(own, monkeypatch):
    """An entry point of the group minillm.methods."""
    from importlib.metadata import EntryPoint, EntryPoints

    from minillm.compress import methods

    monkeypatch.syspath_prepend(str(own.parent))
    point = EntryPoint("keynorm", "keynorm:KEYNORM", methods.ENTRY_POINTS)
    monkeypatch.setattr(methods, "entry_points", lambda: EntryPoints([point]).select(group=methods.ENTRY_POINTS))
    Sequence(CacheConfig("keynorm", 0.3)).read(200).check_kept(0.3)
    assert "\nkeynorm " in methods_table() and "    power = 1.0: " in methods_table()


def test_a_method_from_a_file_on_the_command_line(own, tmp_path):
    model = tiny_chat.make(tmp_path / "tiny")
    flags = ["-q", "-n", "3", "--kv-method", f"{own}:KEYNORM", "--kv-budget", "0.3", "--kv-set", "power=2"]
    command = [sys.executable, "-m", "minillm.run", "-m", str(model), *flags, "--json", "a" * 300]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'"method": "{own}:KEYNORM"' in done.stdout


def test_retrieval_heads_are_found_and_can_be_used(tmp_path):
    """The tool on a tiny model: its file names heads of the model, as many as were asked for, and razor takes it."""
    model, out = tiny_chat.make(tmp_path / "tiny"), tmp_path / "heads.json"
    tool = runpy.run_path(str(ROOT / "tools" / "razor_heads.py"))
    tool["main"]([str(out), "--model", str(model), "--share", "0.5", "--tokens", "40"])
    config = CacheConfig("razor", 0.6, retrieval_heads=str(out))
    assert re.fullmatch(r"\d:\d(,\d:\d)*", config.options["retrieval_heads"])


def test_the_table_of_long_answers(tmp_path, monkeypatch, capsys):
    """Every method that compresses what it generates, but those that need a profile or a file."""
    tool = runpy.run_path(str(ROOT / "tools" / "generate_long.py"))
    methods = [name for name, method in METHODS.items() if method.generates and name not in ("foresight", "razor")]
    model = str(tiny_chat.make(tmp_path / "tiny"))
    flags = ["-m", model, "--entries", "40", "--tokens", "9", "--kv-recompress", "4"]
    monkeypatch.setattr(sys, "argv", ["generate_long.py", *flags, "--methods", "full", *methods])
    tool["main"]()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {name}" for name in ("full", *methods) for _ in range(4)]
    entries = {row[0]: int(row[2]) for row in rows}
    assert all(entries[f"| {name}"] < entries["| full"] / 2 for name in methods)
