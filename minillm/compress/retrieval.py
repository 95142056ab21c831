"""RazorAttention (arXiv 2407.15891): a few retrieval heads keep everything; the others keep sinks and the newest rows,
and one entry for all the rest, which counts for as many tokens as it stands for.

The retrieval heads of a model are found once, by tools/razor_heads.py."""

import json
from pathlib import Path

import numpy as np

from minillm.compress.options import Option
from minillm.compress.plan import Into, others, split
from minillm.errors import UsageError


def heads(layer, scores, target, retrieval_heads):
    """Of a head that may not keep all rows, the best stay beside the protected ones, and the others join the first of
    them: they are one entry of the target."""
    keep_all = _flags(retrieval_heads, layer.index + 1, len(layer.lengths))[layer.index]
    quotas = _quotas(target, layer.lengths, keep_all, _least(layer))
    best = np.maximum(quotas - 1 - layer.n_protected, 0)  # that stay, of a head that may not keep all
    stays = layer.protected | layer.ops.segment_topk(others(scores, layer.protected), layer.lengths, best)
    joins = ~stays & layer.ops.array(quotas < layer.lengths)[layer.heads]
    rows = np.arange(len(stays), like=scores)
    none = np.zeros((), rows.dtype, like=rows)
    firsts = [part.min() if len(part) else none for part in layer.of_heads(np.where(joins, rows, len(rows)))]
    return Into(np.where(joins, np.stack(firsts)[layer.heads], rows))


def layers(ledger, layer, scores, retrieval_heads):
    """All rows of the retrieval heads, of what they leave an equal share for each other head; where they would leave
    the others less than the protected rows and one entry, they keep less."""
    n_layers, n_heads, seen = len(ledger.rows), len(layer.lengths), int(layer.pos.max() - layer.pos.min()) + 1
    keep_all = _flags(retrieval_heads, n_layers, n_heads)[layer.index :]
    most = np.where(keep_all, seen, -(-np.array(ledger.rows[layer.index :]) // n_heads)[:, None])
    quotas = _quotas(ledger.left, most.ravel(), keep_all.ravel(), _least(layer))
    return [*ledger.targets, ledger.bounded(int(quotas[:n_heads].sum()))]


def _least(layer):
    """Entries that a head needs: its protected rows, and one for the rest."""
    return int(layer.n_protected[0]) + 1


def _quotas(total, most, keep_all, least):
    """(heads,) whole numbers of entries, none above `most` (heads,), their sum `total`: where keep_all (heads,), as
    much as leaves the others `least` each."""
    others = np.minimum(most, least)[~keep_all].sum()
    quotas = np.zeros(len(most), np.int64)
    quotas[keep_all] = split(max(total - others, 0), np.ones(keep_all.sum()), most[keep_all])
    quotas[~keep_all] = split(total - quotas.sum(), np.ones((~keep_all).sum()), most[~keep_all])
    return quotas


def _flags(text, n_layers, n_heads):
    """(n_layers, n_heads) bool of "layer:head,layer:head"; layers beyond are left out."""
    flags = np.zeros((n_layers, n_heads), bool)
    for pair in text.split(","):
        layer, head = map(int, pair.split(":"))
        if head >= n_heads:
            raise UsageError(f"retrieval_heads names head {head} of layer {layer}, and the model has {n_heads} a layer")
        if layer < n_layers:
            flags[layer, head] = True
    return flags


def _named(value):
    """ "layer:head,layer:head" as it is, or out of a file that tools/razor_heads.py wrote."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is neither a file that tools/razor_heads.py wrote nor layer:head,layer:head")
    if Path(value).suffix == ".json":
        try:
            pairs = json.loads(Path(value).read_text(encoding="utf-8"))["retrieval_heads"]
            value = ",".join(f"{int(layer)}:{int(head)}" for layer, head in pairs)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read heads from {value} ({error}): tools/razor_heads.py writes it") from None
    if not all(part.count(":") == 1 and part.replace(":", "").isdecimal() for part in value.split(",")):
        raise ValueError(f"{value!r} is neither a file that tools/razor_heads.py wrote nor layer:head,layer:head")
    return value


OPTIONS = {
    "retrieval_heads": Option(
        None,
        _named,
        "the heads that keep everything: a file that tools/razor_heads.py wrote, or layer:head,layer:head",
        needed=True,
    )
}
