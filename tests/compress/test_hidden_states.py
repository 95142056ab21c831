"""Methods of one's own that score from hidden states or token ids: each is one file."""

import numpy as np
import pytest
from literal import rotated
from small_models import VOCAB, compressor_of, config_of, ids_of, model_of, new_cache

from minillm.compress.reading import extend, read

EXPECTED_ATTENTION = '''
"""Expected Attention (Devoto et al. 2025, arXiv 2510.00636), for the query that comes next: the log of the mean of
exp(q . k) over queries that are distributed as those of the text were."""

import numpy as np

from minillm.compress.methods import Method
from minillm.compress.score import Score


def expected_attention(layer):
    q = layer.ops.linear(layer.hidden, layer.block.wq)
    n, d = len(q), layer.k.shape[1]
    q, half = q.reshape(n, -1, d).transpose(1, 0, 2), d // 2  # (Hq, n, d), before RoPE
    cos, sin = layer.cos[-1], layer.sin[-1]
    turned = q[..., :half] * cos - q[..., half:] * sin, q[..., half:] * cos + q[..., :half] * sin
    q = np.concatenate(turned, axis=-1) * np.float32(layer.scale)
    group, scores = len(q) // len(layer.lengths), []
    for head, k in enumerate(layer.of_heads(layer.k)):
        mine = q[head * group : (head + 1) * group]
        mean, centred = mine.mean(axis=1), mine - mine.mean(axis=1, keepdims=True)
        spread = np.square(np.einsum("gnd,rd->gnr", centred, k)).mean(axis=1)
        scores.append((mean @ k.T + spread / 2).mean(axis=0))
    return np.concatenate(scores).astype(np.float32)


METHOD = Method("what such queries would attend to", score=Score(expected_attention, "", reads="hidden"))
'''

BY_TOKEN = """
import numpy as np

from minillm.compress.methods import Method
from minillm.compress.score import Score

METHOD = Method("token 7 before all others", score=Score(lambda layer: (layer.token_ids == 7).astype(np.float32), ""))
"""


def own(tmp_path, text):
    (tmp_path / "own.py").write_text(text)
    return f"{tmp_path / 'own.py'}:METHOD"


def literal_scores(step, model):
    """(H, n) float64, a key at a time."""
    c, n = model.config, len(step.pos)
    inv_freq = np.float64(c.rope.theta) ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    w = np.float64(model.blocks[step.index].wq.data).reshape(c.n_heads, c.head_dim, c.dim)
    group, scores = c.n_heads // c.n_kv_heads, np.zeros((c.n_kv_heads, n))
    for query_head in range(c.n_heads):
        q = rotated(np.float64(step.hidden) @ w[query_head].T, (n - 1) * inv_freq) * c.head_dim**-0.5
        mean, covariance = q.mean(axis=0), np.cov(q.T, bias=True)
        for i, key in enumerate(np.float64(step.k[query_head // group])):
            scores[query_head // group, i] += (mean @ key + key @ covariance @ key / 2) / group
    return scores


def test_expected_attention_is_one_file(tmp_path):
    model, ids = model_of(config_of()), ids_of(200)
    steps = [
        (literal_scores(step, model), step.index) for step in read(model, ids, [new_cache(model)], [None], {"hidden"})
    ]
    compressor = compressor_of(model, own(tmp_path, EXPECTED_ATTENTION), 0.4, sinks=2, window=10)
    cache = new_cache(model)
    extend(model, ids, cache, compressor)
    assert cache.entries == round(0.4 * 200 * cache.lengths.size)
    for scores, layer in steps:
        for head, of_head in enumerate(scores):
            pos = cache.layer(layer).read(head)[3]
            assert pos[:2].tolist() == [0, 1] and pos[-10:].tolist() == list(range(190, 200))
            kept, gone = pos[2:-10], np.setdiff1d(np.arange(2, 190), pos)
            assert of_head[kept].min() >= of_head[gone].max() - 1e-3 * np.ptp(of_head)


def test_a_score_may_look_at_token_ids(tmp_path):
    model, ids = model_of(config_of()), ids_of(300)
    cache = new_cache(model)
    compressor = compressor_of(model, own(tmp_path, BY_TOKEN), 60, sinks=0, window=0)
    extend(model, ids, cache, compressor)
    sevens = [i for i, token in enumerate(ids) if token == 7]
    assert 0 < len(sevens) < 60 and VOCAB > 7
    for layer, head in np.ndindex(cache.lengths.shape):
        assert set(sevens) <= set(cache.layer(layer).read(head)[3].tolist())


@pytest.mark.parametrize("leave_at", [0, 1, 2])
def test_a_reading_may_be_left_at_any_block(leave_at):
    """Only what this reading added is gone."""
    model = model_of(config_of(n_layers=3))
    compressor = compressor_of(model, "kvzip", 0.4)
    cache = new_cache(model)
    extend(model, ids_of(200), cache, compressor)
    before = [cache.read(layer) for layer in range(3)], cache.seen, cache.pool.bytes_in_use
    reading = read(model, ids_of(150, 1), [cache], [compressor])
    for _ in range(leave_at + 1):
        step = next(reading)
    assert step.index == leave_at
    reading.close()
    assert cache.seen == before[1] and cache.pool.bytes_in_use == before[2]
    for layer, entries in enumerate(before[0]):
        now = cache.read(layer)
        for name in ("k", "v", "log_size", "pos", "lengths"):
            np.testing.assert_array_equal(getattr(now, name), getattr(entries, name))


@pytest.mark.parametrize("method", ["snapkv", "semanticache", "foresight", "full"])
def test_a_turn_without_memory_leaves_pages_to_their_owners(method, monkeypatch):
    """Where no slab can be had in the middle of a turn, no page is given back twice: what is read next shares none."""
    model = model_of(config_of())
    compressor = compressor_of(model, method, None if method == "full" else 0.4)
    cache = new_cache(model)
    extend(model, ids_of(300), cache, compressor)
    before = cache.pool.bytes_in_use
    for allowed in range(4):
        slabs, made = iter(range(allowed)), cache.pool.ops.new_slab

        def few(*arguments, slabs=slabs, made=made):
            if next(slabs, None) is None:
                raise MemoryError
            return made(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(type(cache.pool.ops), "new_slab", staticmethod(few))
            with pytest.raises(MemoryError):
                extend(model, ids_of(2000, 1), cache, compressor)
        held = cache.pages[np.arange(cache.pages.shape[2]) < cache.n_pages()[:, :, None]]
        assert cache.seen == 300 and cache.pool.bytes_in_use == before and (cache.pool.refs[held] == 1).all()
