"""What transformers computed, and the ways of reading a sequence that must all give it."""

import json
from pathlib import Path

import numpy as np

from minillm.compress.reading import recompress

DEFAULT = json.loads((Path(__file__).parent / "data" / "golden_default.json").read_text(encoding="utf-8"))


def tiny_golden(llm, folder):
    """ids and logits (n, vocab) of a tiny model; of a model whose rotations change with the length of the sequence only
    what does not."""
    with np.load(folder / "golden.npz") as golden:
        ids, logits = golden["ids"].tolist(), golden["logits"]
    if llm.config.rope.kind in ("dynamic", "longrope"):
        n = llm.config.rope.original_context
        ids, logits = ids[:n], llm.logits(ids[:n])
    return ids, logits


def decoded(llm, ids, first):
    """Logits (n - first + 1, vocab): `first` tokens read at once, the others one by one."""
    session = llm.session()
    session.feed(ids[:first])
    rows = [session.read()]
    rows += stepped(llm, session, ids[first:])
    session.close()
    return np.array(rows)


def extended(llm, ids, step):
    """Logits after every `step` tokens and after the last, read so many at a time: (rows, vocab), and their places."""
    session, rows, places = llm.session(), [], []
    for lo in range(0, len(ids), step):
        session.feed(ids[lo : lo + step])
        rows.append(session.read())
        places.append(min(lo + step, len(ids)) - 1)
    session.close()
    return np.array(rows), places


def stepped(llm, session, ids):
    """Logits (vocab,) after each token of `ids`, decoded one by one, and compressed as they come."""
    rows, cache = [], session.cache
    for token in ids:
        rows.append(llm.model.decode([token], [cache])[0])
        if session.compressor.due(cache):
            recompress(llm.model, cache, session.compressor)
    return rows
