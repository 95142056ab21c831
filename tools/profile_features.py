"""What a profile could predict scores from: features, targets and penalties side by side, on texts held out.

    python tools/profile_features.py            the default model, minillm's own texts: some minutes, 4 GB

Every row is a closed-form fit on four fifths of the texts. On the others: the share of the variance of log scores that
it explains; and, where all layers and heads are cut at once, which share of the best entries it finds, and what the
entries it takes are worth beside the best ones. (minillm.profile: "hidden state", ridge 100, floor 1e-5.)"""

import argparse

import numpy as np
from tqdm import tqdm

from minillm import LLM, CacheConfig
from minillm.profile import make
from minillm.profile.fit import FLOOR, second_reading

SHARES = (0.05, 0.1, 0.2)
VARIANTS = {  # label -> keywords of `fit`
    "hidden state": {},
    "and that of the token before": {"before": True},
    "and the token's position": {"position": True},
    "and delimiters: its class, and the log of how far back the last is": {"delimiters": True},
    "and 256 random nonlinear ones": {"nonlinear": 256},
    "ridge 1": {"ridge": 1.0},
    "ridge 1000": {"ridge": 1000.0},
    "log(score + 1e-3)": {"floor": 1e-3},
    "log(score + 1e-2)": {"floor": 1e-2},
    "weighted by score^1/2": {"power": 0.5},
    "the score itself": {"floor": None},
}


def collect(llm, readings):
    """(h [(N, dim)] and scores [(N, H)] of each layer, (N, F) by name of what else is known of each token)."""
    classes, known = llm.tokenizer.delimiter_classes("default"), {"begins": [], "position": [], "delimiters": []}
    hidden, scores = ([[] for _ in range(llm.config.n_layers)] for _ in "hs")
    for ids, _ in tqdm(readings, unit="text", disable=None):
        for layer, (h, y) in enumerate(second_reading(llm, ids)):
            hidden[layer].append(np.array(h))
            scores[layer].append(np.exp(y.T) - np.float32(FLOOR))
        pos, of_token = np.arange(len(ids)), classes[ids]
        last = np.maximum.accumulate(np.where(of_token > 0, pos, 0))
        known["begins"].append(pos[:, None] == 0)
        known["position"].append(np.column_stack([pos / len(ids), np.log1p(pos)]))
        known["delimiters"].append(np.column_stack([np.eye(classes.max() + 1)[of_token], np.log1p(pos - last)]))
    known = {name: np.concatenate(parts) for name, parts in known.items()}
    return [np.concatenate(parts) for parts in hidden], [np.concatenate(parts) for parts in scores], known


def features(h, known, before=False, nonlinear=0, position=False, delimiters=False):
    """(N, features), the last one constant."""
    parts = [h]
    if before:
        parts.append(np.where(known["begins"], 0, np.roll(h, 1, axis=0)))
    if nonlinear:
        mixing = np.random.default_rng(0).normal(size=(h.shape[1], nonlinear)).astype(np.float32)
        parts.append(np.maximum(h @ mixing / np.sqrt(np.square(h).sum(axis=1, keepdims=True)), 0))
    parts += [known[name].astype(np.float32) for name in ("position",) * position + ("delimiters",) * delimiters]
    return np.column_stack([*parts, np.ones(len(h), np.float32)])


def fit(h, scores, known, fitted, *, floor=FLOOR, ridge=100.0, power=0.0, **kinds):
    """Predictions (M, H) for the M rows that are not `fitted` (N,); floor None: of scores, not of their logs."""
    x = features(h, known, **kinds)
    y = scores if floor is None else np.log(scores + np.float32(floor))
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 0
    found = []
    for head in range(y.shape[1]):
        weight = (scores[fitted, head] + np.float32(1e-3)) ** np.float32(power)
        weighted = x[fitted] * (weight / weight.mean())[:, None]
        found.append(np.linalg.solve(weighted.T @ x[fitted] + np.diag(penalty), weighted.T @ y[fitted, head]))
    return x[~fitted] @ np.stack(found, axis=1).astype(np.float32)


def measures(predicted, scores, logs):
    """R^2 (of logs; - where scores were predicted) and for each share what was found, what it is worth."""
    cells = ["-"]
    if logs:
        wanted = np.log(scores + np.float32(FLOOR))
        cells = [f"{1 - np.square(predicted - wanted).mean() / wanted.var():.3f}"]
    for share in SHARES:
        n = int(share * scores.size)
        taken, best = (np.argpartition(-array.ravel(), n)[:n] for array in (predicted, scores))
        worth = scores.ravel()[taken].sum() / scores.ravel()[best].sum()
        cells.append(f"{len(np.intersect1d(taken, best)) / n:.3f} / {worth:.3f}")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("--length", type=int, default=1000, help="tokens of a text (default 1000)")
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args()
    with LLM.load(args.model, cache=CacheConfig("full"), threads=args.threads) as llm:
        readings = list(make.encode(llm, make.read_texts(), args.length).values())
        hidden, scores, known = collect(llm, readings)
    lengths = [len(ids) for ids, _ in readings]
    number = np.repeat(np.arange(len(readings)), lengths)
    fitted = (number + 1) % make.HELD_OUT != 0
    shown = np.stack([layer[~fitted] for layer in scores])
    print(f"{len(readings)} texts of up to {args.length} tokens\n")
    print(f"| {' | '.join(['predicted from', 'R2', *(f'found / worth at {share:.0%}' for share in SHARES)])} |")
    print("|---" * (2 + len(SHARES)) + "|")
    for label, options in VARIANTS.items():
        predicted = np.stack([fit(h, s, known, fitted, **options) for h, s in zip(hidden, scores, strict=True)])
        cells = measures(predicted, shown, options.get("floor", FLOOR) is not None)
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
