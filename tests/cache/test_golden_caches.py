"""What every method leaves in the cache, held against what it left when tests/data/caches_golden.npz was written.

A prompt, an answer of 40 tokens that is compressed on the way, and a second turn. Where this machine's NumPy computes
the full cache's logits bit for bit as they were, caches must be the same bit for bit; elsewhere the same entries must
be kept, and what they hold may differ by rounding. The compiled kernels round otherwise: most entries must be the same.

    OPENBLAS_NUM_THREADS=1 python tests/cache/test_golden_caches.py

writes the file anew: a commit must say what changed, and why."""

import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
from paths import DATA
from threadpoolctl import threadpool_limits

from minillm import LLM, CacheConfig, SamplingParams
from minillm.cache import state as cache_state
from minillm.compress.methods import METHODS
from minillm.files.profile_file import Profile, fingerprint
from minillm.ops import cpu_lib

GOLDEN = DATA / "caches_golden.npz"
UNASKED = {"asked": False}
NEEDS = {"razor": {"retrieval_heads": "0:1"}, "hindsight": UNASKED, "foresight": UNASKED}
GENERATED = 40
FIELDS = ("lengths", "pos", "log_size", "k", "v")
CONFIGS = {
    **{name: (name, 0.4, NEEDS.get(name, {})) for name in METHODS if name != "full"},
    "full": ("full", None, {}),
    "full int8": ("full", None, {"dtype": "int8"}),
    "hindsight int8": ("hindsight", 0.3, {"dtype": "int8", **UNASKED}),
    "hindsight unmatched": ("hindsight", 0.3, {"match": 0, **UNASKED}),
    "foresight int8": ("foresight", 0.2, {"dtype": "int8", **UNASKED}),
    "foresight threshold": ("foresight", None, {"threshold": 0.05, **UNASKED}),
    "foresight entries": ("foresight", 48, UNASKED),
    "semanticache tau": ("semanticache", None, {"tau": 0.5}),
    "semanticache cached": ("semanticache", 0.2, {"rope": "cached", "chunking": "fixed:8"}),
    "streaming moved": ("streaming", 40, {"positions": "cache"}),
    "h2o per query": ("h2o", 0.3, {"per_query": True}),
    "laprox frobenius": ("laprox", 0.3, {"gqa": "frobenius"}),
    "kvzip entries": ("kvzip", 40, {}),
    "window global fold": ("snapkv", 0.3, {"allocate": "global", "merge": "fold"}),
    "adakv entries": ("adakv", 24, {"group": "max"}),
}


def text(n, seed):
    """n small letters in sentences: one token each."""
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(list("abcdefghijklmnop,. "), n))


@cache
def model():
    """The folder of the tiny model, with a profile of random weights beside it."""
    folder = tiny_chat.make(Path(tempfile.mkdtemp()) / "tiny")
    with LLM.load(folder, profile=False, cache=CacheConfig("full")) as llm:
        config, norms = llm.config, llm.model.norms
        rng, shape = np.random.default_rng(3), (config.n_layers, config.n_kv_heads)
        weight = rng.normal(0, 0.1, (*shape, config.dim)).astype(np.float16).astype(np.float32)
        worth = rng.normal(0, 0.3, shape).astype(np.float32)
        curve = {name: np.array([0.1], np.float32) for name in ("threshold", "kept", "quality")}
        about = {"model": "tiny", "fingerprint": fingerprint(config, norms), "repeated": {"foretold_full": 0}}
        Profile(weight, np.full(shape, -3, np.float32), worth, curve, about).save(folder / "minillm.profile")
    return folder


def states(name):
    """The arrays of the cache after the prompt, after the answer and after the second turn; and the answer's ids."""
    method, budget, options = CONFIGS[name]
    config = CacheConfig(method, budget, **({} if method == "full" else {"recompress": 16}) | options)
    found = []
    with LLM.load(model(), cache=config) as llm:
        session = llm.session()
        session.feed(text(300, 0))
        pieces = session.stream(SamplingParams(max_tokens=GENERATED, ignore_eos=True))
        ids = [next(pieces).token_id]
        found.append(cache_state.state(session.cache))
        ids += [piece.token_id for piece in pieces]
        found.append(cache_state.state(session.cache))
        session.feed(text(60, 1))
        next(session.stream(SamplingParams(max_tokens=1)))
        found.append(cache_state.state(session.cache))
    return found, ids


def summary(state):
    """Of a state: lengths, positions and log sizes, and of each key and value its product with a fixed vector."""
    d = state["k"].shape[1]
    vector = np.cos(np.arange(d, dtype=np.float64))

    def rows(which):
        words = state[which]
        if words.dtype == np.int8:
            return words @ vector * (state[f"{which}_scale"].astype(np.uint32) << 16).view(np.float32)
        if words.dtype == np.uint16:
            words = (words.astype(np.uint32) << 16).view(np.float32)
        return words @ vector

    return {
        "lengths": state["lengths"].astype(np.int32),
        "pos": state["pos"].astype(np.int16),
        "log_size": state["log_size"],
        "k": rows("k").astype(np.float32),
        "v": rows("v").astype(np.float32),
    }


def bits(found):
    digest = hashlib.sha256()
    for state in found:
        for name in sorted(state.keys() & {*FIELDS, "k_scale", "v_scale"}):
            digest.update(name.encode() + np.ascontiguousarray(state[name]).tobytes())
    return digest.hexdigest()[:16]


@cache
def arithmetic():
    """Which bits this machine's NumPy computes: a digest of the full cache's logits."""
    with LLM.load(model(), cache=CacheConfig("full")) as llm:
        return hashlib.sha256(llm.logits(llm.encode(text(300, 0))).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module", autouse=True)
def as_many_threads_of_blas_as_when_it_was_written():
    """They decide in which order a product is summed."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", CONFIGS)
def test_numpy_leaves_what_it_left(name, golden):
    found, ids = states(name)
    assert ids == golden[f"{name}/ids"].tolist()
    if arithmetic() == golden["arithmetic"]:
        assert bits(found) == golden[f"{name}/bits"]
    for turn, state in enumerate(found):
        for field, values in summary(state).items():
            expected = golden[f"{name}/{turn}/{field}"]
            if field in ("lengths", "pos"):
                np.testing.assert_array_equal(values, expected, err_msg=f"{name}, {turn}, {field}")
            else:
                atol = 0.05 if "int8" in name else 2e-3  # 8 bits: one unit of a few elements of the row
                np.testing.assert_allclose(values, expected, rtol=1e-3, atol=atol, err_msg=f"{name}, {turn}, {field}")


PATH = (cpu_lib.available_paths() or ["portable"])[0]


@pytest.mark.skipif(not cpu_lib.available_paths(), reason="there is no C compiler, and so no compiled kernels")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_compiled_kernels_leave_nearly_the_same(name, golden, monkeypatch):
    """After the prompt: pages hold 16 bits, and a row that scores nearly as another may be kept in its place."""
    monkeypatch.setenv("MINILLM_CPU", PATH)
    (state, *_), _ = states(name)
    found, wanted = summary(state), {field: golden[f"{name}/0/{field}"] for field in FIELDS}
    if not {"tau", "threshold"} & CONFIGS[name][2].keys():
        assert found["lengths"].sum() == wanted["lengths"].sum()
    ours, theirs = by_entry(found), by_entry(wanted)
    both = sorted(ours.keys() & theirs.keys())
    assert len(both) >= 0.9 * len(theirs), f"{len(both)} of {len(theirs)} entries"
    pairs = np.array([(*ours[key], *theirs[key]) for key in both])
    off = np.abs(pairs[:, :3] - pairs[:, 3:]) > 0.1
    assert off.any(axis=1).mean() <= 0.1


def by_entry(state):
    """(head, position) -> (log size, key, value) of every entry, heads of all layers one after another."""
    heads = np.repeat(np.arange(state["lengths"].size), state["lengths"].ravel())
    columns = (state[field].tolist() for field in ("log_size", "k", "v"))
    return dict(zip(zip(heads.tolist(), state["pos"].tolist(), strict=True), zip(*columns, strict=True), strict=True))


def write():
    arrays = {"arithmetic": np.array(arithmetic())}
    for name in CONFIGS:
        found, ids = states(name)
        arrays |= {f"{name}/ids": np.array(ids, np.int32), f"{name}/bits": np.array(bits(found))}
        for turn, state in enumerate(found):
            arrays |= {f"{name}/{turn}/{field}": values for field, values in summary(state).items()}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    os.environ["MINILLM_CPU"] = "numpy"
    sys.exit(write())
