"""From texts to a profile: what a second reading attends to, explained by the hidden states of the first.

Closed form: ridge regression by normal equations that are added up text after text, so that memory does not grow."""

from contextlib import closing

import numpy as np

from minillm.compress.plan import Layer
from minillm.compress.reading import Rereading
from minillm.compress.score import reread

FLOOR = 1e-5  # attention below this is none: the log of a score is at least that of it
RIDGE = 100.0


def second_reading(llm, token_ids):
    """Read a text twice. Yields for each layer the normalised hidden states h (n, dim) of the first reading, and logs
    (H, n) of what hindsight scores each token: the largest attention it gets in the second, the mean of a group."""
    model, ops, n, empty = llm.model, llm.model.ops, len(token_ids), llm.new_cache()
    with closing(Rereading(model, token_ids, empty)) as again:
        for step in model.layers([(model.embed(token_ids), 0)], empty.layer, {"hidden"}):
            rows = layer_of(model, step, np.zeros(n, bool), again.layer(step))
            scores = ops.host(reread(rows, "mean", worth=False, asked=False)).reshape(llm.config.n_kv_heads, n)
            yield ops.host(ops.stored_rows(step.hidden)), np.log(scores + np.float32(FLOOR))


def layer_of(model, step, protected, queries=()):
    """The Layer of the tokens of a Step that reads a text, one row each in every head. protected (n,); queries: of a
    second reading."""
    array, (n_heads, n, d) = model.ops.array, step.k.shape
    block = model.blocks[step.index]
    cos, sin = model.rotations(np.arange(n), n)[block.rope]
    return Layer(
        index=step.index,
        k_rows=step.k.reshape(-1, d),
        v_rows=step.v.reshape(-1, d),
        size=array(np.ones(n_heads * n, np.float32)),
        pos=array(np.tile(np.arange(n, dtype=np.int32), n_heads)),
        find_tokens=lambda: (None, None),  # nothing here asks for tokens
        protected=array(np.tile(protected, n_heads)),
        lengths=np.full(n_heads, n),
        cos=cos,
        sin=sin,
        ops=model.ops,
        scale=model.scale,
        attention_window=block.window,
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
