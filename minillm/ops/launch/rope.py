"""Rotation: of new queries and keys, on their way into pages too, and back."""

from minillm.ops.launch.start import blocks_of_rows, head_defines, page_defines, run


def rope_split(device, qkv, bias, norms, eps, cos, sin, temperature, q, k, v, real16):
    """q (Hq, n, d), k and v (H, n, d) from qkv (n, (Hq + 2 H) d) real16; q and k over their norms (d,), which may be
    None, and turned by cos, sin (n, d/2); q times temperature (n,) or None."""
    (n_heads, n, d), n_kv_heads = q.shape, len(k)
    assert qkv.shape == (n, (n_heads + 2 * n_kv_heads) * d) and cos.shape == sin.shape == (n, d // 2)
    assert k.shape == v.shape == (n_kv_heads, n, d)
    arguments = {"qkv": qkv, "bias": bias, "cos": cos, "sin": sin, "q": q, "k": k, "v": v}
    arguments |= {"q_norm": norms[0], "k_norm": norms[1], "eps": eps, "temperature": temperature}
    arguments |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    grid = n, blocks_of_rows(n_heads + 2 * n_kv_heads, d)
    run(device, "rope", "rope_split", grid, (256,), arguments, defines=head_defines(d, real16))


def rope_append(device, qkv, bias, norms, eps, cos, sin, temperature, q, past, real16):
    """A decode step: q (B, Hq, d) as in `rope_split`, k too and with v into the last entry of every head of `past`
    (Paged)."""
    (batch, n_heads, d), n_kv_heads = q.shape, past.lengths.shape[1]
    assert qkv.shape == (batch, (n_heads + 2 * n_kv_heads) * d) and cos.shape == sin.shape == (batch, d // 2)
    arguments = {"qkv": qkv, "bias": bias, "cos": cos, "sin": sin, "q": q, "seen": past.seen}
    arguments |= {"q_norm": norms[0], "k_norm": norms[1], "eps": eps, "temperature": temperature}
    arguments |= past.arguments() | {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    grid = batch, blocks_of_rows(n_heads + 2 * n_kv_heads, d)
    defines = page_defines(d, real16, past.format)
    run(device, "rope_append", "rope_append", grid, (256,), arguments, defines=defines)


def unrotate(device, rows, pos, cos, sin, factor, out, real16):
    """out (n, d) = rows (n, d) turned back from their positions pos (n,); cos, sin (positions, d/2) carry a factor
    for each pair, (d/2,), or none."""
    n, d = rows.shape
    arguments = {"rows": rows, "pos": pos, "cos": cos, "sin": sin, "factor": factor, "out": out, "n": n}
    run(device, "rope", "unrotate", (blocks_of_rows(n, d),), (256,), arguments, defines=head_defines(d, real16))
