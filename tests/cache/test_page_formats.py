"""A cache of 8 bits and fewer, whole models and sessions: what is stored, how far it is from floats, what it takes."""

import json

import numpy as np
import pytest
import tiny_chat
from small_models import compressor_of, config_of, ids_of, literal_extend, model_of, same

from minillm import LLM, CacheConfig, MinillmError, SamplingParams
from minillm.cache.kv_cache import Entries, KVCache
from minillm.cache.page_pool import PagePool
from minillm.compress.reading import extend, recompress
from minillm.engine.admission import cache_bytes
from minillm.errors import UsageError
from minillm.evaluate.cli import main as evaluate
from minillm.ops import cpu_lib
from minillm.ops.numpy_ops import NUMPY
from minillm.ops.pages import FLOAT32
from minillm.programs.run import main as run

CLOSE = {
    "int8": 0.03,
    "k5v4": 0.3,
    "q4": 0.4,
}  # of the root mean square of logits: a tiny random model makes much of it
EACH = pytest.mark.parametrize("dtype", CLOSE)
SETTINGS = {
    "full": (None, {}),
    "semanticache": (0.3, {}),
    "streaming": (0.4, {}),
    "snapkv": (60, {}),
    "hindsight": (0.4, {}),
    "foresight": (0.4, {}),
}


def new_cache(model, dtype):
    c = model.config
    pool = PagePool(model.ops, c.head_dim, 4, 5 * 4 * FLOAT32.entry_bytes(c.head_dim), dtype)
    return KVCache(pool, c.n_layers, c.n_kv_heads)


def words(cache, layer, head):
    """{position: {field: what it is}} of a head's entries, as they are stored."""
    found = {}
    for run_ in cache.layer(layer).runs(head):
        for i, pos in enumerate(run_["pos"].tolist()):
            found[pos] = {name: array[i].tolist() for name, array in run_.items()}
    return found


@EACH
@pytest.mark.parametrize("method", SETTINGS)
def test_a_turn_reads_what_is_stored(method, dtype):
    """Its logits are those of attention in float64 over exactly the rounded rows that the turn before left."""
    budget, options = SETTINGS[method]
    model = model_of(config_of())
    cache, compressor = new_cache(model, dtype), compressor_of(model, method, budget, **options)
    for turn, n in enumerate((150, 9, 12)):
        expected = literal_extend(model, ids_of(n, turn), cache) if turn else None
        logits = model.logits(extend(model, ids_of(n, turn), cache, compressor))
        if turn:
            same(logits, expected)
            assert (cache.kept < 0.9) == (method != "full")
    assert all(run_["k"].dtype == (np.int8 if dtype == "int8" else np.uint8) for run_ in cache.layer(0).runs(0))


@EACH
@pytest.mark.parametrize("method", ["streaming", "snapkv", "foresight"])
def test_entries_that_stay_are_the_same_words(method, dtype):
    """However often their layer is compressed again."""
    model = model_of(config_of())
    cache, compressor = new_cache(model, dtype), compressor_of(model, method, 60, merge="drop", recompress=20)
    extend(model, ids_of(150), cache, compressor)
    before = [[words(cache, layer, head) for head in range(2)] for layer in range(2)]
    for token in ids_of(45, 1):
        model.decode([token], [cache])
        if compressor.due(cache):
            recompress(model, cache, compressor)
    n = 0
    for layer in range(2):
        for head in range(2):
            after = words(cache, layer, head)
            stayed = before[layer][head].keys() & after.keys()
            n += len(stayed)
            assert all(before[layer][head][pos] == after[pos] for pos in stayed)
    assert n > 20


@pytest.mark.parametrize("dtype, most", [("int8", 0.001), ("k5v4", 0.08), ("q4", 0.08)])
def test_ten_sums_wear_a_row_little(dtype, most):
    """A value that takes in one after another, and is rounded each time: the mean of ten and how far from it, squared,
    on average of 40 heads. One rounding of 4 bits is .008."""
    rng, heads, d = np.random.default_rng(0), 40, 64
    cache = KVCache(PagePool(NUMPY, d, dtype=dtype), 1, heads)
    values = rng.standard_normal((10, heads, 1, d)).astype(np.float32)
    for n, value in enumerate(values):
        cache.append(0, value, value, [n])
        if n:
            labels = np.zeros(heads, np.float32), np.zeros(heads, np.int32), np.ones(heads, int)
            weights = np.tile(np.array([n, 1], np.float32) / (n + 1), heads)
            entries, dest = Entries(None, None, *labels), np.repeat(np.arange(heads), 2)
            cache.rewrite(slice(0, 1), np.zeros(heads, int), dest, (weights, weights), entries)
    exact, found = values.mean(axis=0)[:, 0], cache.read(0)
    for rows in (found.k, found.v):
        assert 0 < ((rows - exact) ** 2).sum() <= most * (exact**2).sum()


@EACH
@pytest.mark.parametrize("path", ["numpy", *cpu_lib.available_paths()])
def test_logits_are_near_those_of_floats(path, dtype, tiny_models, monkeypatch):
    """Prompt, turn and generation, on every path."""
    monkeypatch.setenv("MINILLM_CPU", path)
    logits = {}
    for one in ("auto", dtype):
        with LLM.load(tiny_models["tied-head"], cache=CacheConfig("full", dtype=one)) as llm:
            session = llm.session()
            rows = []
            for ids in (list(range(5, 60)), list(range(3, 20))):
                session.feed(ids)
                rows.append(session.read())
            rows += [llm.model.decode([token], [session.cache])[0] for token in range(30)]
            logits[one] = np.array(rows)
    difference = logits[dtype] - logits["auto"]
    assert 0 < np.sqrt((difference**2).mean()) <= CLOSE[dtype] * np.sqrt((logits["auto"] ** 2).mean())


@EACH
def test_bytes(tiny_models, dtype):
    """Of an entry d numbers twice, two scales, log s and its position; what is promised is what is held."""
    with LLM.load(tiny_models["tied-head"], cache=CacheConfig("full", dtype=dtype)) as llm:
        d, heads = llm.config.head_dim, llm.config.n_layers * llm.config.n_kv_heads
        session = llm.session()
        session.feed(list(range(64)))
        session.read()
        cache = session.cache
        blocks = -(-d // 32)
        rows = {"int8": 2 * d, "k5v4": blocks * (20 + 16), "q4": blocks * (16 + 16)}[dtype]
        assert cache.bytes_in_use == 64 * heads * (rows + 2 * 2 + 4 + 4)
        assert cache.full_bytes == heads * 2 * 32 * llm.model.ops.page_format.entry_bytes(d) > 1.3 * cache.bytes_in_use
        promised = cache_bytes(llm.config, llm.cache_config, llm.model.ops, 64)
        assert cache.bytes_in_use <= promised < cache_bytes(llm.config, CacheConfig("full"), llm.model.ops, 64)
        assert llm.pool.bytes_in_use == cache.bytes_in_use
    assert llm.pool.bytes_held == 0


@pytest.mark.parametrize("dtype, other_dtype", [("int8", "auto"), ("auto", "int8"), ("q4", "int8"), ("k5v4", "q4")])
def test_a_session_is_saved_and_restored(dtype, other_dtype, tmp_path):
    """A file of the bytes of its entries; the same words, the same next logits; a file of the other kind is refused."""
    tiny = tiny_chat.make(tmp_path / "tiny")
    with LLM.load(tiny, cache=CacheConfig("snapkv", 140, dtype=dtype)) as llm:
        session = llm.session()
        session.feed(list(range(3, 60)) * 4)
        session.read()
        session.save(tmp_path / "session")
        stored = session.cache.entries * llm.pool.format.entry_bytes(llm.config.head_dim)
        assert 0 < (tmp_path / "session").stat().st_size - stored < 5000 < stored / 3
        other = llm.session()
        other.restore(tmp_path / "session")
        for layer in range(llm.config.n_layers):
            for head in range(llm.config.n_kv_heads):
                assert words(other.cache, layer, head) == words(session.cache, layer, head)
        logits = [llm.model.decode([7], [one.cache]) for one in (session, other)]
        np.testing.assert_array_equal(*logits)
        kept = llm.pool.format.name
    with LLM.load(tiny, cache=CacheConfig("snapkv", 140, dtype=other_dtype)) as llm:
        with pytest.raises(MinillmError, match=f"cache dtype '{kept}'"):
            llm.session().restore(tmp_path / "session")


@EACH
def test_one_model_has_caches_of_both_kinds(tmp_path, dtype):
    with LLM.load(tiny_chat.make(tmp_path / "tiny")) as llm:
        one = llm.session()
        llm.set_cache(CacheConfig("full", dtype=dtype))
        other = llm.session()
        for session in (one, other):
            session.feed(list(range(40)))
            session.read()
        assert other.cache.bytes_in_use < one.cache.bytes_in_use == one.cache.full_bytes
        llm.generate_batch(["abc", "de"], SamplingParams(3))
        llm.trim()
        one.close()
        other.close()
        assert all(pool.bytes_held == 0 for pool in llm.pools.values())


def test_what_cannot_be_asked_for():
    with pytest.raises(UsageError, match="a cache's dtype is auto, int8, k5v4 or q4, not 'int4'"):
        CacheConfig("foresight", 0.2, dtype="int4")
    assert CacheConfig("foresight", 0.2).as_dict() == CacheConfig("foresight", 0.2, dtype="auto").as_dict()


@EACH
def test_the_command_line(tmp_path, capsys, dtype):
    tiny = str(tiny_chat.make(tmp_path / "tiny"))
    shared = ["-m", tiny, "-n", "3", "-p", "what is it? " * 90, "--json"]
    found = {}
    for one in ("auto", dtype):
        assert run([*shared, "--kv-method", "streaming", "--kv-budget", "0.5", "--kv-dtype", one]) == 0
        found[one] = json.loads(capsys.readouterr().out)["cache"]
    assert found[dtype]["entries"] == found["auto"]["entries"]
    assert found[dtype]["full_bytes"] == found["auto"]["full_bytes"]
    assert found[dtype]["bytes"] < 0.8 * found["auto"]["bytes"]
    assert run([*shared, "--kv-dtype", "int4"]) == 2
    assert "'int4' is not one of auto, int8, k5v4, q4" in capsys.readouterr().err


def test_an_evaluation_has_both(tmp_path, capsys):
    """A line each, the full cache of 8 bits among them."""
    tiny = str(tiny_chat.make(tmp_path / "tiny"))
    out = tmp_path / "results.jsonl"
    flags = f"-m {tiny} --length 150 --following 20 -n 2 --kv-dtype auto,int8 --out {out}".split()
    assert evaluate(["perplexity", *flags, "--kv-method", "streaming", "--kv-budget", "0.5"]) == 0
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = [(row["cache"]["method"], row["cache"].get("dtype", "auto")) for row in rows]
    assert sorted(set(kinds)) == [(method, dtype) for method in ("full", "streaming") for dtype in ("auto", "int8")]
    assert "| full int8 | all |" in table and "| streaming int8 | 50 % |" in table
    scores = {kind: row["scores"]["nll"] for kind, row in zip(kinds, rows, strict=True)}
    assert scores["full", "int8"] != scores["full", "auto"]
