"""Pages, sequences and their bytes against plain Python lists."""

import gc

import numpy as np
import pytest

from minillm.cache import state as cache_state
from minillm.cache.kv_cache import Entries, KVCache
from minillm.cache.page_pool import PagePool
from minillm.errors import MinillmError
from minillm.memory import resident_memory
from minillm.ops.numpy_ops import NUMPY as numpy_ops

F32 = np.float32
D, PAGE = 2, 4
DTYPE = PAGE_BYTES = None
BYTES = {"auto": PAGE * (2 * D * 4 + 4 + 4), "int8": PAGE * (2 * D + 2 * 2 + 4 + 4)}  # of a page


@pytest.fixture(params=BYTES, autouse=True)
def _both_kinds(request, monkeypatch):
    """All of this file is of pages of floats and of pages of 8 bits."""
    monkeypatch.setattr(f"{__name__}.DTYPE", request.param)
    monkeypatch.setattr(f"{__name__}.PAGE_BYTES", BYTES[request.param])


def new_pool(slab_pages=5, page_size=PAGE):
    return PagePool(numpy_ops, D, page_size, slab_pages * PAGE_BYTES, DTYPE)


def random_rows(rng, *shape):
    """(*shape, D) numbers that 8 bits tell apart."""
    rows = rng.integers(-127, 128, (*shape, D)).astype(F32)
    rows[..., 0] = 127
    return rows


def random_entries(rng, lengths):
    """Entries of heads of these lengths."""
    n = int(np.sum(lengths))
    k, v = random_rows(rng, 2, n)
    return Entries(k, v, rng.normal(size=n).astype(F32), rng.integers(0, 999, n).astype(np.int32), np.array(lengths))


def rows_of(entries, head):
    """The entries of one head as a list of tuples of numbers."""
    first = int(entries.lengths[:head].sum())
    rows = range(first, first + int(entries.lengths[head]))
    return [
        (*entries.k[r].tolist(), *entries.v[r].tolist(), float(entries.log_size[r]), int(entries.pos[r])) for r in rows
    ]


class ListCache:
    """The oracle: entries as lists of tuples, for each layer and head."""

    def __init__(self, n_layers, n_heads):
        self.heads = [[[] for _ in range(n_heads)] for _ in range(n_layers)]
        self.token_ids, self.tail = [], 0

    def fork(self):
        other = ListCache(0, 0)
        other.heads = [[list(head) for head in layer] for layer in self.heads]
        other.token_ids, other.tail = list(self.token_ids), self.tail
        return other


def check_same(cache, expected):
    for index, layer in enumerate(expected.heads):
        view, whole = cache.layer(index), cache.read(index)
        assert view.seen == len(expected.token_ids)
        for h, head in enumerate(layer):
            assert cache.lengths[index, h] == len(head)
            assert rows_of(whole, h) == head
            k, v, log_size, pos = view.read(h)
            assert rows_of(Entries(k, v, log_size, pos, np.array([len(head)])), 0) == head
    assert cache.token_ids == expected.token_ids and cache.seen == len(expected.token_ids)
    assert cache.left.tail == expected.tail
    assert cache.entries == sum(len(head) for layer in expected.heads for head in layer)


def check_pages(pool, caches):
    """Every page a table holds is counted, as often as tables hold it, and no other."""
    held = np.zeros(len(pool.refs), int)
    for cache in caches:
        for index, h in np.ndindex(cache.lengths.shape):
            pages = cache.pages[index, h, : -(-cache.lengths[index, h] // PAGE)]
            assert len(set(pages.tolist())) == len(pages)
            held[pages] += 1
    np.testing.assert_array_equal(pool.refs, held)
    assert pool.bytes_in_use == np.count_nonzero(held) * PAGE_BYTES
    assert pool.bytes_held == len(pool.slabs) * pool.slab_pages * PAGE_BYTES
    assert len(pool.refs) == len(pool.slabs) * pool.slab_pages


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_on_forked_sequences(seed):
    """append, write, cut, fork, clear, trim, advance and dropping a sequence, in any order: each sequence holds what a
    list would, whatever the others do."""
    rng = np.random.default_rng(seed)
    n_layers, n_heads = 2, int(rng.integers(1, 4))
    pool = new_pool(int(rng.integers(1, 8)))
    pairs = [(KVCache(pool, n_layers, n_heads), ListCache(n_layers, n_heads))]
    for _ in range(100):
        cache, expected = pairs[rng.integers(len(pairs))]
        index = int(rng.integers(n_layers))
        layer = expected.heads[index]
        match rng.choice(["append", "write", "start", "cut", "fork", "clear", "trim", "advance"]):
            case "append":
                n = int(rng.integers(1, 12))
                k, v = random_rows(rng, 2, n_heads, n)
                pos = rng.integers(0, 999, n)
                cache.append(index, k, v, pos)
                for h in range(n_heads):
                    layer[h] += [(*k[h, i].tolist(), *v[h, i].tolist(), 0.0, int(pos[i])) for i in range(n)]
            case "write":
                entries = random_entries(rng, rng.integers(0, 9, n_heads))
                cache.write(index, entries)
                for h in range(n_heads):
                    layer[h] += rows_of(entries, h)
            case "start":
                entries = random_entries(rng, rng.integers(0, 9, n_heads))
                start = np.array([rng.integers(0, len(head) + 1) for head in layer])
                cache.write(index, entries, start)
                for h in range(n_heads):
                    layer[h][start[h] :] = rows_of(entries, h)
            case "cut":
                lengths = np.array([[rng.integers(0, len(head) + 3) for head in heads] for heads in expected.heads])
                cache.cut(lengths)
                expected.heads = [
                    [h[:m] for h, m in zip(*x, strict=True)] for x in zip(expected.heads, lengths, strict=True)
                ]
            case "fork" if len(pairs) < 4:
                pairs.append((cache.fork(), expected.fork()))
            case "clear" if rng.random() < 0.4:
                cache.clear()
                expected.__init__(n_layers, n_heads)
                if len(pairs) > 1 and rng.random() < 0.5:
                    pairs = [pair for pair in pairs if pair[0] is not cache]
            case "trim":
                pool.trim()
                assert len(pool.slabs) == -(-np.count_nonzero(pool.refs) // pool.slab_pages)
            case "advance":
                ids = rng.integers(0, 50, rng.integers(0, 4)).tolist()
                tail = None if rng.random() < 0.5 else int(rng.integers(0, 5))
                cache.advance(ids, tail)
                expected.token_ids += ids
                expected.tail = expected.tail + len(ids) if tail is None else tail
        check_pages(pool, [cache for cache, _ in pairs])
        for pair in pairs:
            check_same(*pair)
    for cache, _ in pairs:
        cache.clear()
    pool.trim()
    assert pool.bytes_in_use == pool.bytes_held == 0


class Tables:
    """A copy of a cache's page tables, as a device has one that only `version` and `lengths` tell what has changed."""

    def __init__(self, cache):
        self.cache, self.version = cache, None

    def follow(self):
        """-> whether the tables had to be copied"""
        cache, new = self.cache, self.version != self.cache.version
        if new:
            self.tables, self.version = cache.pages.copy(), cache.version
        elif (cache.lengths != self.lengths).any():
            np.testing.assert_array_equal(cache.lengths, self.lengths + 1)  # else nobody could follow
            wider = cache.pages.shape[2] - self.tables.shape[2]
            self.tables = np.pad(self.tables, [(0, 0), (0, 0), (0, wider)])
            newest = (cache.lengths[:, :, None] - 1) // PAGE
            np.put_along_axis(self.tables, newest, np.take_along_axis(cache.pages, newest, axis=2), axis=2)
        self.lengths = cache.lengths.copy()
        held = np.arange(cache.pages.shape[2]) < cache.n_pages()[:, :, None]
        np.testing.assert_array_equal(self.tables[held], cache.pages[held])
        return new


def test_the_version_of_page_tables_says_whether_they_changed():
    """Whatever writes them: all but the page of an entry that make_room adds. It is nobody else's version."""
    rng, pool = np.random.default_rng(0), new_pool(3)
    caches = [KVCache(pool, 2, 3), KVCache(pool, 2, 3), KVCache(pool, 2, 3, window=2 * PAGE)]
    copies, copied = (
        {},
        dict.fromkeys(["room", "append", "start", "cut", "clear", "fork", "trim", "advance", "restore"], 0),
    )
    for _ in range(600):
        which, what = int(rng.integers(3)), str(rng.choice(list(copied)))
        cache, before = caches[which], [other.version for other in caches]
        match what:
            case "room":
                cache.make_room()
            case "append":
                k, v = rng.normal(size=(2, 3, 5, D)).astype(F32)
                for layer in range(2):
                    cache.append(layer, k, v, np.arange(5))
            case "start":
                start = rng.integers(0, cache.lengths[1] + 1)
                cache.write(1, random_entries(rng, rng.integers(0, 9, 3)), start)
            case "cut":
                cache.cut(np.maximum(cache.lengths - rng.integers(0, 3, (2, 3)), 0))
            case "clear" if rng.random() < 0.2:
                cache.clear()
            case "fork" if which < 2:
                caches[1 - which].clear()
                caches[1 - which] = cache.fork()
            case "trim":
                pool.trim()
            case "advance" if cache.window:
                cache.advance([1, 2])
            case "restore" if rng.random() < 0.3:
                cache_state.restore(
                    cache, cache_state.state(caches[0]) | {"token_ids": np.arange(2000), "tail": np.array(0)}
                )
        for other, version in zip(caches, before, strict=True):
            copied[what] += copies.setdefault(other, Tables(other)).follow()
            assert what != "room" or other.version == version
        assert len({other.version for other in caches}) == 3
        check_pages(pool, caches)
        copies = {other: copies[other] for other in caches}
    assert copied.pop("room") == 0 and all(copied.values()), copied


def test_page_tables_are_not_written_from_outside():
    cache = KVCache(new_pool(), 1, 2)
    with pytest.raises(ValueError, match="read-only"):
        cache.pages[0, 0, 0] = 1


# whose pages, and how many bytes


def test_heads_hold_as_many_pages_as_they_need():
    pool = new_pool()
    cache = KVCache(pool, 2, 3)
    cache.write(1, random_entries(np.random.default_rng(0), [0, 9, 4]))
    np.testing.assert_array_equal(cache.n_pages(), [[0, 0, 0], [0, 3, 1]])
    assert cache.bytes_in_use == pool.bytes_in_use == 4 * PAGE_BYTES
    assert pool.bytes_held == 5 * PAGE_BYTES
    assert pool.page_bytes == PAGE_BYTES == PAGE * pool.format.entry_bytes(D)


def test_full_bytes_and_kept_are_of_the_tokens_seen():
    cache = KVCache(new_pool(), 2, 3)
    assert cache.kept == 1.0 and cache.full_bytes == 0
    cache.advance(range(9))
    for index in range(2):
        cache.write(index, random_entries(np.random.default_rng(0), [1, 2, 6]))
    assert cache.seen == 9 and cache.entries == 18
    assert cache.kept == 18 / (2 * 3 * 9)
    assert cache.full_bytes == 2 * 3 * 3 * BYTES["auto"]  # nine tokens are three pages


def test_freed_pages_serve_the_next_sequence():
    pool, rng = new_pool(), np.random.default_rng(0)
    first = KVCache(pool, 1, 2)
    first.write(0, random_entries(rng, [30, 7]))
    held = pool.bytes_held
    first.clear()
    assert pool.bytes_in_use == 0 and pool.bytes_held == held
    second = KVCache(pool, 1, 2)
    second.write(0, random_entries(rng, [8, 28]))
    assert pool.bytes_held == held and pool.bytes_in_use == 9 * PAGE_BYTES


def test_pages_written_at_once_lie_together():
    """Then a head is one view, and attention copies nothing."""
    pool = new_pool(slab_pages=16)
    cache = KVCache(pool, 1, 2)
    cache.write(0, random_entries(np.random.default_rng(0), [22, 30]))
    for head, length in enumerate((22, 30)):
        runs = list(cache.layer(0).runs(head))
        assert [len(run["pos"]) for run in runs] == [length]
        assert np.shares_memory(runs[0]["k"], pool.slabs[0].fields["k"])


def test_reading_from_a_start():
    pool = new_pool(2)
    cache = KVCache(pool, 1, 2)
    entries = random_entries(np.random.default_rng(0), [21, 6])
    cache.write(0, entries)
    for start in ([0, 0], [1, 6], [4, 5], [20, 3], [21, 0]):
        part = cache.read(0, np.array(start))
        assert part.lengths.tolist() == [21 - start[0], 6 - start[1]]
        for head in range(2):
            assert rows_of(part, head) == rows_of(entries, head)[start[head] :]


def test_trim_moves_pages_and_leaves_the_contents():
    pool, rng = new_pool(4), np.random.default_rng(0)
    caches = [KVCache(pool, 2, 2) for _ in range(6)]
    for cache in caches:
        for index in range(2):
            cache.write(index, random_entries(rng, rng.integers(5, 40, 2)))
    caches.append(caches[5].fork())
    for gone in (0, 2, 3):
        caches[gone].clear()
    del caches[2:4], caches[0]
    before = [[cache.read(index) for index in range(2)] for cache in caches]
    held, in_use = pool.bytes_held, pool.bytes_in_use
    pool.trim()
    assert pool.bytes_in_use == in_use
    assert pool.bytes_held == -(-in_use // (4 * PAGE_BYTES)) * 4 * PAGE_BYTES < held
    check_pages(pool, caches)
    for cache, layers in zip(caches, before, strict=True):
        for index, entries in enumerate(layers):
            for head in range(2):
                assert rows_of(cache.read(index), head) == rows_of(entries, head)


def test_trim_gives_memory_back_to_the_system():
    if resident_memory() is None:
        pytest.skip("this system does not tell")
    pool = PagePool(numpy_ops, 64)
    n, rng = 100_000, np.random.default_rng(0)  # 2 heads x 50,000 entries x 520 bytes = 50 MiB a sequence
    rows = np.ones((n, 64), F32)
    entries = Entries(rows, rows, np.zeros(n, F32), np.zeros(n, np.int32), np.array([n // 2, n // 2]))
    before = resident_memory()
    caches = [KVCache(pool, 1, 2) for _ in range(5)]
    for cache in caches:
        cache.write(0, entries)
    small = KVCache(pool, 1, 2)
    small.write(0, Entries(*random_entries_of(rng, 64, 100)))  # at the very end of the memory
    kept = rows_of(small.read(0), 0)
    during = resident_memory()
    assert pool.bytes_in_use > 230 << 20
    assert during - before > 0.95 * pool.bytes_in_use
    for cache in caches:
        cache.clear()
    assert resident_memory() > during - (1 << 20)  # pages are free for the next sequence, not for the system
    pool.trim()
    gc.collect()
    assert pool.bytes_held <= 8 << 20  # one slab
    assert resident_memory() < before + (24 << 20)
    assert rows_of(small.read(0), 0) == kept


def random_entries_of(rng, d, n):
    k, v = rng.normal(size=(2, 2 * n, d)).astype(F32)
    return k, v, np.zeros(2 * n, F32), np.arange(2 * n, dtype=np.int32), np.array([n, n])


def test_compressing_a_long_sequence_gives_its_pages_back():
    """Half of each head is overwritten and the rest given up: the pages behind are free at once."""
    pool, rng = new_pool(50), np.random.default_rng(0)
    cache = KVCache(pool, 1, 2)
    cache.write(0, random_entries(rng, [200, 200]))
    assert pool.bytes_in_use == 100 * PAGE_BYTES
    cache.write(0, random_entries(rng, [20, 3]), [40, 10])
    assert cache.lengths.tolist() == [[60, 13]]
    assert pool.bytes_in_use == (15 + 4) * PAGE_BYTES


def test_a_cache_that_is_dropped_gives_its_pages_back():
    pool = new_pool()
    cache = KVCache(pool, 1, 1)
    cache.write(0, random_entries(np.random.default_rng(0), [30]))
    del cache
    gc.collect()
    assert pool.bytes_in_use == 0


# forks


def test_a_fork_shares_pages_until_one_writes():
    pool, rng = new_pool(), np.random.default_rng(0)
    cache = KVCache(pool, 1, 2)
    entries = random_entries(rng, [10, 8])  # two full pages and a half, and two full pages
    cache.write(0, entries)
    cache.advance(range(10))
    fork = cache.fork()
    assert pool.bytes_in_use == 5 * PAGE_BYTES and cache.bytes_in_use == fork.bytes_in_use == 5 * PAGE_BYTES
    assert fork.seen == 10 and fork.token_ids is not cache.token_ids

    one, two = random_rows(rng, 2, 2, 1)
    fork.append(0, one, one, [10])
    assert pool.bytes_in_use == 7 * PAGE_BYTES  # a copy of the half page, a new one for the other head
    cache.append(0, two, two, [10])
    assert pool.bytes_in_use == 8 * PAGE_BYTES  # the half page is the first one's own now
    for which, last in ((cache, two), (fork, one)):
        for head in range(2):
            rows = rows_of(which.read(0), head)
            assert rows[:-1] == rows_of(entries, head)
            assert rows[-1] == (*last[head, 0].tolist(), *last[head, 0].tolist(), 0.0, 10)
    cache.clear()
    assert pool.bytes_in_use == fork.bytes_in_use == 6 * PAGE_BYTES


def test_a_fork_that_is_compressed_leaves_the_other_whole():
    pool, rng = new_pool(), np.random.default_rng(0)
    cache = KVCache(pool, 1, 1)
    cache.write(0, random_entries(rng, [23]))
    before = rows_of(cache.read(0), 0)
    fork = cache.fork()
    fork.write(0, random_entries(rng, [5]), [6])
    fork.cut(np.array([[9]]))
    pool.trim()
    assert rows_of(cache.read(0), 0) == before
    assert rows_of(fork.read(0), 0)[:6] == before[:6]
    fork.clear()
    pool.trim()
    assert rows_of(cache.read(0), 0) == before and pool.bytes_in_use == 6 * PAGE_BYTES


# what was seen and what is stored


def test_seen_and_lengths_are_apart():
    cache = KVCache(new_pool(), 1, 2)
    cache.write(0, random_entries(np.random.default_rng(0), [3, 5]))
    assert cache.seen == 0  # stored, but the forward pass is not through
    cache.advance([7, 8, 9, 7, 8, 9, 1])
    assert cache.seen == 7 and cache.layer(0).seen == 7
    assert cache.lengths.tolist() == [[3, 5]]
    assert cache.left.tail == 7
    cache.advance([4], tail=2)
    assert cache.seen == 8 and cache.left.tail == 2
    cache.cut(np.array([[2, 2]]))
    assert cache.seen == 8 and cache.token_ids[-1] == 4
    cache.clear()
    assert cache.seen == cache.left.tail == cache.entries == 0


# saving


def saved(rng):
    cache = KVCache(new_pool(3), 2, 2)
    for index, lengths in enumerate(([7, 12], [1, 30])):
        entries = random_entries(rng, lengths)
        entries.pos %= 40
        cache.write(index, entries)
    cache.advance(rng.integers(0, 99, 40).tolist(), tail=1)
    return cache


def test_state_and_restore():
    cache = saved(np.random.default_rng(0))
    state = {name: np.array(array) for name, array in cache_state.state(cache).items()}
    other = KVCache(new_pool(0, 8), 2, 2)  # other pages, other slabs
    cache_state.restore(other, state)
    assert other.seen == 40 and other.left.tail == 1 and other.token_ids == cache.token_ids
    for index in range(2):
        for head in range(2):
            assert rows_of(other.read(index), head) == rows_of(cache.read(index), head)
    for name, array in cache_state.state(other).items():
        np.testing.assert_array_equal(array, state[name])
        assert array.dtype == state[name].dtype


def test_the_state_is_the_words_of_the_pages():
    cache = saved(np.random.default_rng(0))
    state, rows = cache_state.state(cache), 0
    for index in range(2):
        for head in range(2):
            for run in cache.layer(index).runs(head):
                for name, words in run.items():
                    assert state[name].dtype == words.dtype
                    np.testing.assert_array_equal(state[name][rows : rows + len(words)], words)
                rows += len(run["pos"])
    assert rows == cache.entries == len(state["pos"])


def test_the_state_is_a_copy():
    cache = KVCache(new_pool(), 1, 1)
    cache.write(0, random_entries(np.random.default_rng(0), [3]))
    state = cache_state.state(cache)
    before = {name: array.copy() for name, array in state.items()}
    cache.write(0, random_entries(np.random.default_rng(1), [3]), [0])
    cache.advance([1])
    for name, array in state.items():
        np.testing.assert_array_equal(array, before[name])


def without(name):
    return lambda state: state.pop(name)


def replaced(name, change):
    return lambda state: state.update({name: change(state[name])})


DAMAGE = {
    "no keys": without("k"),
    "no positions": without("pos"),
    "no lengths": without("lengths"),
    "no token ids": without("token_ids"),
    "keys cut short": replaced("k", lambda k: k[:-1]),
    "values of another head_dim": replaced("v", lambda v: np.zeros((len(v), D + 1), F32)),
    "sizes missing": replaced("log_size", lambda s: s[1:]),
    "positions as a table": replaced("pos", lambda p: p[:, None]),
    "more layers": replaced("lengths", lambda n: np.vstack([n, n[:1] * 0])),
    "one head": replaced("lengths", lambda n: n.sum(axis=1, keepdims=True)),
    "a longer head": replaced("lengths", lambda n: n + [[1, 0], [0, 0]]),
    "a negative length": replaced("lengths", lambda n: n + [[-10, 10], [0, 0]]),
    "a tail of two numbers": replaced("tail", lambda t: np.array([1, 1])),
    "a tail longer than a head": replaced("tail", lambda t: np.array(2)),
    "a negative tail": replaced("tail", lambda t: np.array(-1)),
    "a position that was never read": replaced("pos", lambda p: np.where(p == p.max(), 40, p)),
    "token ids as a table": replaced("token_ids", lambda t: t[:, None]),
    "a negative token id": replaced("token_ids", lambda t: -1 - t),
    "token ids that are no whole numbers": replaced("token_ids", lambda t: t + 0.5),
    "keys that are not finite": lambda state: (
        np.put(state["k_scale"], 3, 0x7F80) if "k_scale" in state else np.put(state["k"], 3, np.nan)
    ),
    "sizes that are not finite": replaced("log_size", lambda s: s + np.inf),
    "keys of another type": replaced("k", lambda k: k.astype(np.int32)),
    "sizes of another type": replaced("log_size", lambda s: s.astype(np.float64)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(damage):
    state = cache_state.state(saved(np.random.default_rng(0)))
    DAMAGE[damage](state)
    pool = new_pool()
    cache = KVCache(pool, 2, 2)
    with pytest.raises(MinillmError):
        cache_state.restore(cache, state)
    assert cache.entries == cache.seen == pool.bytes_in_use == 0


def test_restore_replaces_what_is_stored_or_leaves_it():
    state = cache_state.state(saved(np.random.default_rng(0)))
    pool, rng = new_pool(), np.random.default_rng(1)
    cache = KVCache(pool, 2, 2)
    for index in range(2):
        cache.write(index, random_entries(rng, [9, 3]))
    cache.advance([1, 2, 3])
    before = {name: array.copy() for name, array in cache_state.state(cache).items()}
    with pytest.raises(MinillmError):
        cache_state.restore(cache, state | {"k": state["k"][:-1]})
    for name, array in cache_state.state(cache).items():
        np.testing.assert_array_equal(array, before[name])
    cache_state.restore(cache, state)
    for name, array in cache_state.state(cache).items():
        np.testing.assert_array_equal(array, state[name])
    check_pages(pool, [cache])
