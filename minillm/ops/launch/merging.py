"""What becomes of rows: clusters of them, sums of them, some of them."""

from minillm.ops.launch.start import blocks, blocks_of_rows, head_defines, run


def take(device, rows, index, out):
    """out (n, d) = rows index (n,) of rows (R, d)."""
    n, d = out.shape
    assert d % 8 == 0 and len(index) == n
    arguments = {"rows": rows, "index": index, "out": out, "d": d, "n": n}
    run(device, "take", "take", (blocks(n * d // 8, 256),), (256,), arguments)


def merge(device, rows, order, first, weight, out, real16):
    """out (E, d): entry e = sum of weight[r] * rows[r] over r in order[first[e] : first[e + 1]]; first (E + 1,)."""
    (n, d), arguments = out.shape, {"rows": rows, "order": order, "first": first, "weight": weight, "out": out}
    assert len(first) == n + 1 and len(weight) == len(rows)
    arguments["n_entries"] = n
    run(device, "merge", "merge", (blocks_of_rows(n, d),), (256,), arguments, defines=head_defines(d, real16))


def merge_unrotated(device, rows, unrotated, pos, order, first, weight, entry_pos, cos, sin, out, real16):
    """`merge` of keys with the rotation at pos (R,) undone; sums are turned to entry_pos (E,)."""
    n, d = out.shape
    assert len(first) == n + 1 and len(entry_pos) == n and len(weight) == len(pos) == len(rows) == len(unrotated)
    arguments = {"rows": rows, "unrotated": unrotated, "pos": pos, "order": order, "first": first, "weight": weight}
    arguments |= {"entry_pos": entry_pos, "cos": cos, "sin": sin, "out": out, "n_entries": n}
    grid, defines = (blocks_of_rows(n, d),), head_defines(d, real16)
    run(device, "merge", "merge_unrotated", grid, (256,), arguments, defines=defines)


def nearest(device, keys, rows, others, first, last, found, cosine, real16):
    """found (n,) int32, cosine (n,): for each of rows (n,), the one of others[first : last] most like it, or -1."""
    n = len(rows)
    assert len(first) == len(last) == len(found) == len(cosine) == n
    arguments = {"keys": keys, "rows": rows, "others": others, "first": first, "last": last}
    arguments |= {"found": found, "cosine": cosine, "n": n}
    run(device, "nearest", "nearest", (blocks(n, 8),), (256,), arguments, defines=head_defines(keys.shape[1], real16))


def unit_rows(device, keys, out, real16):
    """out (C, d) float32 = keys (C, d), each over its norm."""
    n, d = out.shape
    arguments = {"keys": keys, "unit": out, "n": n}
    run(device, "clusters", "unit_rows", (blocks(n, 8),), (256,), arguments, defines=head_defines(d, real16))


def keep_cosines(device, unit, starts, lengths, place, kept, real16):
    """kept[place[m] + i * L + j] = cosine of rows i < j of segment m, for segments with place >= 0."""
    arguments = {"unit": unit, "starts": starts, "lengths": lengths, "place": place, "kept": kept}
    arguments["n_segments"] = len(starts)
    grid, defines = (blocks(len(starts), 4),), head_defines(unit.shape[1], real16)
    run(device, "clusters", "keep_cosines", grid, (128,), arguments, defines=defines)


def clusters(device, unit, kept, starts, lengths, place, taus, counts, seed, similarity, taken, real16):
    """counts (taus,) int32 += clusters for each of taus (taus,); seed, similarity (taus, C) or None. taken (taus, C)
    uint8, zero, where there are long segments; else None."""
    common = {"starts": starts, "lengths": lengths, "place": place, "taus": taus, "counts": counts}
    common |= {"seed": seed, "similarity": similarity, "n_rows": len(unit)}
    defines, n_taus, n_segments = head_defines(unit.shape[1], real16), len(taus), len(starts)
    arguments = common | {"kept": kept, "n_segments": n_segments}
    run(device, "clusters", "short_clusters", (blocks(n_segments, 4), n_taus), (128,), arguments, defines=defines)
    if taken is not None:
        arguments = common | {"unit": unit, "taken": taken}
        run(device, "clusters", "long_clusters", (n_segments, n_taus), (256,), arguments, defines=defines)
