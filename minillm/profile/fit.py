"""From texts to a profile: what a second reading attends to, explained by the hidden states of the first.

Closed form: ridge regression by normal equations that are added up text after text, so that memory does not grow."""

import numpy as np

from minillm.compress.plan import Layer
from minillm.compress.score import reread
from minillm.model import Rereading

FLOOR = 1e-5  # attention below this is none: the log of a score is at least that of it
RIDGE = 100.0


def second_reading(llm, token_ids):
    """Read a text twice. Yields for each layer the normalised hidden states h (n, dim) of the first reading, and logs
    (H, n) of what hindsight scores each token: the largest attention it gets in the second, the mean of a group."""
    model, config = llm.model, llm.config
    ops, n = model.ops, len(token_ids)
    empty = llm.new_cache()
    pos = np.arange(n)
    cos, sin = model.rope.tables(pos, n)
    x, again = ops.embed(model.embedding, token_ids), Rereading(model, token_ids, empty)
    for index, block in enumerate(model.blocks):
        h = ops.rms_norm(x, block.attention_norm, config.rms_eps)
        _, _, k, v, _, mixed = model.attention(index, x, cos, sin, empty.layer(index))
        rows = layer_of(model, index, k, v, np.zeros(n, bool), queries=again.layer(index, k, v, pos))
        scores = ops.host(reread(rows, "mean", worth=False)).reshape(config.n_kv_heads, n)
        yield ops.host(ops.stored_rows(h)), np.log(scores + np.float32(FLOOR))
        model.output(index, x, mixed)


def layer_of(model, index, k, v, protected, queries=()):
    """The Layer of the tokens of a text, one row each in every head: k, v (H, n, d), protected (n,);
    queries: of a second reading."""
    array, (n_heads, n, d) = model.ops.array, k.shape
    cos, sin = model.rope.tables(np.arange(n), n)
    return Layer(
        index=index,
        k_rows=k.reshape(-1, d),
        v_rows=v.reshape(-1, d),
        size=array(np.ones(n_heads * n, np.float32)),
        pos=array(np.tile(np.arange(n, dtype=np.int32), n_heads)),
        find_classes=lambda: None,  # nothing here asks for delimiters
        protected=array(np.tile(protected, n_heads)),
        lengths=np.full(n_heads, n),
        cos=cos,
        sin=sin,
        ops=model.ops,
        scale=model.scale,
        attention_window=model.config.sliding_window,
        queries=queries,
    )


class Equations:
    """The normal equations of one layer: targets (n, H) from features (n, dim) and a constant."""

    def __init__(self, dim, n_heads):
        self.products = np.zeros((dim + 1, dim + 1))
        self.targets = np.zeros((dim + 1, n_heads))

    def add(self, h, y):
        """h (n, dim); y (n, H)."""
        x = np.column_stack([h, np.ones(len(h), h.dtype)])
        self.products += x.T @ x
        self.targets += x.T @ y

    def solve(self, ridge=RIDGE):
        """(w (H, dim), b (H,)) float32 with the least sum of squared errors + ridge |w|^2; the constant goes free."""
        penalty = np.full(len(self.products), ridge)
        penalty[-1] = 1e-6
        solution = np.linalg.solve(self.products + np.diag(penalty), self.targets).T.astype(np.float32)
        return solution[:, :-1], solution[:, -1]


def rank_correlation(a, b):
    """Spearman's, of two vectors without ties worth minding."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])
