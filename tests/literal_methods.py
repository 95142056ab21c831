"""Eviction methods as their papers and reference code print them, in float64, a query, a row or a head at a time.
Nothing here calls minillm; scores are lists, one array a KV head, of its rows that compete (not protected)."""

from fractions import Fraction

import numpy as np


def attention(q, q_pos, k, pos, scale):
    """softmax(q.k * scale) of each query over the rows at positions up to its own: q (m, d), k (n, d) -> (m, n)."""
    out = np.zeros((len(q), len(k)))
    for t, query in enumerate(np.float64(q)):
        logits = np.where(pos <= q_pos[t], np.float64(k) @ query * scale, -np.inf)
        e = np.exp(logits - max(logits.max(), -1e300))
        out[t] = e / max(e.sum(), 1e-300)
    return out


def pool(x, width, kind):
    """Of each number the largest, or the sum / width, of those around it."""
    out = []
    for j in range(len(x)):
        around = [x[i] for i in range(j - width // 2, j - width // 2 + width) if 0 <= i < len(x)]
        out.append(max(around) if kind == "max" else sum(around) / width)
    return np.array(out)


class Rows:
    """What a literal method sees of a layer. heads: dicts of k (n, d), v (n, d), pos, protected, one a KV head; q
    (Hq, m, d) at q_pos (m,); wo (dim, Hq * d)."""

    def __init__(self, heads, q, q_pos, wo, scale):
        self.heads, self.group, self.wo = heads, len(q) // len(heads), np.float64(wo)
        self.free = [np.flatnonzero(~head["protected"]) for head in heads]
        self.v = [np.float64(head["v"])[free] for head, free in zip(heads, self.free, strict=True)]
        self.a = []  # of each query head (m, rows that compete)
        for h in range(len(q)):
            head = heads[h // self.group]
            whole = attention(q[h], q_pos, head["k"], head["pos"], scale)
            self.a.append(whole[:, self.free[h // self.group]])

    def of(self, kv_head):
        """The query heads of a KV head."""
        return range(kv_head * self.group, (kv_head + 1) * self.group)

    def w_o(self, h):
        """W_O^h (d, dim)."""
        d = self.v[0].shape[1]
        return self.wo[:, h * d : (h + 1) * d].T


def snapkv(rows, width=7, kind="max", group="mean"):
    """Mean over queries, mean or largest of the group, then pooled."""
    out = []
    for g in range(len(rows.heads)):
        of_group = [rows.a[h].sum(axis=0) / len(rows.a[h]) for h in rows.of(g)]
        out.append(pool(sum(of_group) / rows.group if group == "mean" else np.max(of_group, axis=0), width, kind))
    return out


def h2o(rows):
    """The sum over queries, mean over the group."""
    return [sum(rows.a[h].sum(axis=0) for h in rows.of(g)) / rows.group for g in range(len(rows.heads))]


def kvzip(rows):
    """The largest of all queries and of the group."""
    return [np.max([rows.a[h].max(axis=0) for h in rows.of(g)], axis=0) for g in range(len(rows.heads))]


def cake(rows, gamma=200.0, width=5):
    """mean + gamma var (unbiased) over queries, mean over the group, average-pooled."""
    out = []
    for g in range(len(rows.heads)):
        of_group = [rows.a[h].sum(axis=0) / len(rows.a[h]) + gamma * variance(rows.a[h]) for h in rows.of(g)]
        out.append(pool(sum(of_group) / rows.group, width, "avg"))
    return out


def variance(a):
    """Of each column, unbiased (0 of a single row)."""
    return ((a - a.sum(axis=0) / len(a)) ** 2).sum(axis=0) / max(len(a) - 1, 1)


def cake_preference(rows, tau1=1.0, tau2=1.0):
    """H^(1/tau1) V^(1/tau2) of a layer."""
    entropy = -sum((a * np.log(a + 1e-10)).sum() for a in rows.a)
    return entropy ** (1 / tau1) * sum(variance(a).sum() for a in rows.a) ** (1 / tau2)


def lava(rows, width=7):
    """The largest of the group of max-pooled means, times the largest L1 norm of a value of the head."""
    out = []
    for g in range(len(rows.heads)):
        of_group = [pool(rows.a[h].mean(axis=0), width, "max") for h in rows.of(g)]
        largest = max((sum(abs(x) for x in value) for value in rows.v[g]), default=0.0)
        out.append(np.array([max(column) for column in zip(*of_group, strict=True)]) * largest)
    return out


def lava_entropy(scores):
    flat = np.concatenate(scores)
    p = flat / flat.sum()
    return -sum(x * np.log(x) for x in p if x > 0) / np.log(len(flat))


def tova(rows):
    """The newest query, mean over all query heads (whose KV heads all hold the same tokens)."""
    of_all = sum(a[-1] for a in rows.a) / len(rows.a)
    return [of_all] * len(rows.heads)


def laprox(rows, gqa="product_mean", norm=True, width=7, kind="avg"):
    """|A_h[:, j]| |v_j W_O^h|, v_j W_O^h written out."""
    out = []
    for g in range(len(rows.heads)):
        p = np.zeros(len(rows.free[g]))
        for j in range(len(p)):
            columns = [rows.a[h][:, j] for h in rows.of(g)]
            moved = [rows.v[g][j] @ rows.w_o(h) for h in rows.of(g)]
            if gqa == "product_mean":
                products = [np.linalg.norm(c) * np.linalg.norm(m) for c, m in zip(columns, moved, strict=True)]
                p[j] = sum(products) / rows.group
            elif gqa == "mean_attn":
                p[j] = np.linalg.norm(sum(columns) / rows.group)
                p[j] *= sum(np.linalg.norm(m) for m in moved) / rows.group
            else:  # the norm of the whole term of the sum over column-row pairs
                p[j] = np.linalg.norm(sum(np.outer(c, m) for c, m in zip(columns, moved, strict=True)))
        out.append(pool(p, width, kind))
    total = sum(p.sum() for p in out)
    return [p / total for p in out] if norm else out


def value_effect(rows, order):
    """Mean over the group of |v_j W_O^h|_1 or _2."""
    return [
        np.array([sum(np.linalg.norm(v @ rows.w_o(h), order) for h in rows.of(g)) for v in rows.v[g]]) / rows.group
        for g in range(len(rows.heads))
    ]


# budgets


def largest_remainder(total, quotas, most):
    """Whole numbers near the quotas (Fractions that add up to total), none above `most`; what one cannot take is
    shared out in proportion among the others, in equal parts if these have no quota."""
    given, fixed = list(quotas), {}
    while True:
        full = {i for i in range(len(given)) if i not in fixed and given[i] >= most[i]}
        if not full:
            break
        fixed |= {i: Fraction(most[i]) for i in full}
        left, others = total - sum(fixed.values()), [i for i in range(len(given)) if i not in fixed]
        weight = sum(quotas[i] for i in others)
        for i in others:
            given[i] = left * quotas[i] / weight if weight else Fraction(left, len(others))
        given = [fixed.get(i, x) for i, x in enumerate(given)]
    whole = [x.numerator // x.denominator for x in given]
    by_remainder = sorted(range(len(given)), key=lambda i: (whole[i] - given[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def proportional(total, weights, most):
    total = min(total, sum(most))
    exact = [Fraction(float(w)).limit_denominator(10**15) for w in weights]
    everything = sum(exact)
    if not everything:
        exact, everything = [Fraction(1)] * len(exact), len(exact)
    return largest_remainder(total, [total * w / everything for w in exact], most)


def adaptive_counts(scores, total, alpha):
    """Algorithm 1 of Ada-KV, mixed with the uniform share alpha."""
    flat = [(-x, g, j) for g, head in enumerate(scores) for j, x in enumerate(head)]
    hits = [0] * len(scores)
    for _, g, _ in sorted(flat)[:total]:
        hits[g] += 1
    alpha = Fraction(str(alpha))
    quotas = [(1 - alpha) * f + alpha * Fraction(total, len(scores)) for f in hits]
    return largest_remainder(total, quotas, [len(head) for head in scores])


def pyramid_layers(total, n_layers, n_heads, n, n_protected, beta):
    """Entries of each layer beside the protected ones: `total` of all layers; n rows a head, n_protected of them
    protected."""
    h = Fraction(total, n_layers * n_heads)
    free = [n_heads * (n - n_protected)] * n_layers
    if n < 2 * h or n_layers == 1:
        return largest_remainder(total, [Fraction(total, n_layers)] * n_layers, free)
    low = h / beta
    high = 2 * h - low
    if high >= n - n_protected:
        high, low = Fraction(n - n_protected), 2 * h - (n - n_protected)
    step = (high - low) / (n_layers - 1)
    return largest_remainder(total, [n_heads * (high - layer * step) for layer in range(n_layers)], free)


# cuts


class Near(Exception):
    """Two different scores at a cut are too near for float32 to tell which is the larger."""


def cut(scores, count, band=3e-5):
    """The indices of the `count` largest numbers, of equal ones the earlier."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    if 0 < count < len(order):
        last, first_out = scores[order[count - 1]], scores[order[count]]
        if 0 < last - first_out <= band * abs(last):
            raise Near
    return sorted(order[:count])


def cut_each(scores, counts):
    return [cut(head, count) for head, count in zip(scores, counts, strict=True)]


def uniform(scores, total):
    n_heads = len(scores)
    counts = largest_remainder(total, [Fraction(total, n_heads)] * n_heads, [len(head) for head in scores])
    return cut_each(scores, counts)


def flat(scores, total):
    """One cut through all of them."""
    places = [(g, j) for g, head in enumerate(scores) for j in range(len(head))]
    chosen = {places[i] for i in cut(np.concatenate(scores), total)}
    return [[j for j in range(len(head)) if (g, j) in chosen] for g, head in enumerate(scores)]


def adaptive(scores, total, alpha=0.2, normalize=False):
    weighed = scores
    if normalize:  # times the share of a head's scores that its best `total / heads` rows have
        k = -(-total // len(scores))
        best = [sum(sorted(head, reverse=True)[:k]) for head in scores]
        weighed = [head * (top / sum(head)) if top else head for head, top in zip(scores, best, strict=True)]
    flat(weighed, total)  # raises Near
    return cut_each(scores, adaptive_counts(weighed, total, alpha))


def critical(scores, effect, total, alpha=1.0, first_stage=0.5):
    """CriticalKV: stage 1 by score, stage 2 by (score + eps) |v W_O|."""
    if alpha < 1:
        flat(scores, total)
    kept = []
    for head, weight, count in zip(scores, effect, adaptive_counts(scores, total, alpha), strict=True):
        stage1 = cut(head, int(Fraction(str(first_stage)) * count))
        rest = [j for j in range(len(head)) if j not in stage1]
        stage2 = cut([(head[j] + 1e-4) * weight[j] for j in rest], count - len(stage1))
        kept.append(sorted(stage1 + [rest[i] for i in stage2]))
    return kept
