"""python -m minillm.profile: texts are read twice, and what the second reading attends to is fitted. Some of the texts
are held out, and say how well the fit foretells it and what is left of a text at each threshold."""

import datetime
import hashlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minillm.compress.config import CacheConfig
from minillm.errors import UsageError
from minillm.files.profile_file import EVIDENCE, Profile, fingerprint, place_of_users
from minillm.llm import LLM
from minillm.profile.curve import REPEATED, STRETCHES, repeat
from minillm.profile.fit import Equations, rank_correlation, second_reading
from minillm.profile.worth import log_worth, try_heads
from minillm.programs import flags
from minillm.programs.run import guarded

TEXTS = Path(__file__).parent / "texts"
LENGTH, SHORTEST = 4096, 256  # tokens of a text: at most, where nothing else is said, and at least
HELD_OUT = 5  # every so many-th text
TRIALS = 2  # of the others every so many-th says what entries are worth
QUESTION = "\n\nWhat does it say after this?"
SHARES = (0.8, 0.6, 0.45, 0.33, 0.25, 0.18, 0.13, 0.1, 0.07, 0.05, 0.035, 0.025)  # of the scores, above the thresholds

DESCRIPTION = """\
Fit a profile of a model: a small linear map that tells, as a token is read, what it will be worth to each attention
head, so that the cache method foresight needs no second reading. It takes forty minutes of CPU time for the default
model and minillm's own texts; memory does not grow with the texts. Programs that load the model find the profile by
themselves."""


def main(argv=None):
    """Runs the command line; -> exit status."""
    return guarded(_run, argv)


def _run(argv):
    args = _parser().parse_args(argv)
    texts = read_texts(args.texts)
    llm = LLM.load(args.model, cache=CacheConfig("full"), profile=False, progress=True, **flags.machine(args))
    length = min(args.length, llm.context)
    if length < SHORTEST:
        raise UsageError(f"{llm.config.name} has a context of {length} tokens, and a profile takes {SHORTEST} at least")
    readings = enough(encode(llm, texts, length), texts)
    texts = {name: texts[name] for name in readings}
    fitted, held_out = split(list(readings.values()))
    total = len(fitted) + len(fitted[::TRIALS]) + 2 * len(held_out)
    with tqdm(total=total, unit="text", disable=None) as bar:
        profile = make(llm, fitted, held_out, bar.update)
    profile.about |= {"texts": sorted(texts), "digest": digest(texts), "length": length}
    path = args.out and args.out.expanduser()
    if path is None:
        path = place_of_users(profile.about["fingerprint"])
    profile.save(path)
    print(report(profile))
    print(f"\n{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _parser():
    parser = flags.Parser(
        prog="minillm.profile",
        description=DESCRIPTION,
    )
    add = parser.add_argument
    flags.model_flag(add)
    add("--texts", type=Path, metavar="FOLDER", help="of .txt files in place of minillm's own: such as yours will be")
    add(
        "--length",
        type=flags.at_least(SHORTEST),
        default=LENGTH,
        metavar="N",
        help=f"most tokens of a text (default {LENGTH})",
    )
    add("--out", type=Path, metavar="FILE", help="the profile (default: where it is found, in the user's cache)")
    flags.machine_flags(add)
    add("-v", "--verbose", action="store_true", help="show where an error came from")
    return parser


def read_texts(folder=None):
    """name -> text, of the .txt files of a folder (None: those of minillm)."""
    folder = TEXTS if folder is None else folder.expanduser()
    texts = {}
    for file in sorted(folder.glob("*.txt")):
        try:
            texts[file.stem] = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} cannot be read ({error}): give a folder of UTF-8 texts") from error
    if len(texts) < HELD_OUT:
        raise UsageError(
            f"--texts {folder}: {len(texts)} .txt files, and {HELD_OUT} at least are needed, of many kinds"
        )
    return texts


def digest(texts):
    return hashlib.sha256("\0".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]


class Reading(NamedTuple):
    """ids: of a text. asks: what stands between it and a passage of it: in a chat a question, the end of the turn."""

    ids: list[int]
    asks: list[int] = ()


def encode(llm, texts, length):
    """name -> Reading of each text, `length` tokens at most; every other text is what a user says in a chat, where the
    model has a template for that. Texts of fewer than SHORTEST tokens are left out: they are hardly compressed."""
    chats, asks = bool(llm.tokenizer and llm.tokenizer.has_chat_template), []
    if chats:
        one, other = (llm.encode([{"role": "user", "content": word + QUESTION}]) for word in ("one", "two"))
        asks = one[next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b) + 1 :]
    readings = {}
    for number, name in enumerate(sorted(texts)):
        chat = number % 2 and chats
        ids = llm.encode([{"role": "user", "content": texts[name]}] if chat else texts[name])
        if len(ids) >= SHORTEST:
            readings[name] = Reading(ids[:length], asks if chat else [])
    return readings


def enough(readings, texts):
    """The readings, where they are enough to fit some and hold some out; which texts are not among them is said."""
    short = f"shorter than {SHORTEST} tokens: {', '.join(sorted(texts.keys() - readings.keys()))}"
    if len(readings) < HELD_OUT:
        raise UsageError(
            f"{len(readings)} of {len(texts)} texts are long enough, and {HELD_OUT} at least are needed, of many "
            f"kinds: give more, or longer ones ({short})"
        )
    if len(readings) < len(texts):
        print(f"minillm: left out, as {short}", file=sys.stderr)
    return readings


def split(readings):
    """(those to fit, those to hold out)"""
    held_out = readings[HELD_OUT - 1 :: HELD_OUT]
    return [ids for number, ids in enumerate(readings) if (number + 1) % HELD_OUT], held_out


def make(llm, fitted, held_out, done=lambda: None):
    """The Profile of a model from Readings. done() is called after every one."""
    config = llm.config
    equations = [Equations(config.dim, config.n_kv_heads) for _ in range(config.n_layers)]
    for ids, _ in fitted:
        for layer, (h, y) in zip(equations, second_reading(llm, ids), strict=True):
            layer.add(h, y.T)
        done()
    weight, bias = (np.stack(parts) for parts in zip(*(layer.solve() for layer in equations), strict=True))
    about = {
        "model": config.name,
        "fingerprint": fingerprint(config, llm.model.norms),
        "weights": llm.weights_digest,
        "date": datetime.date.today().isoformat(),
        "versions": {"minillm": version("minillm-engine"), "numpy": np.__version__},
    }
    profile = Profile(weight, bias, np.zeros_like(bias), {}, about)
    llm.set_profile(profile)
    profile.worth = log_worth(*try_heads(llm, fitted[::TRIALS], done))
    llm.set_profile(profile)
    weight, bias = profile.projection
    correlations, predicted = [], []
    for ids, _ in held_out:
        foretold = []
        for layer, (h, y) in enumerate(second_reading(llm, ids)):
            foretold.append(weight[layer] @ h.T + bias[layer][:, None])
            correlations += [rank_correlation(a, b) for a, b in zip(foretold[-1], y, strict=True)]
        predicted.append(np.exp(foretold).ravel())
        done()
    about["correlation"] = round(float(np.mean(correlations)), 4)
    thresholds = np.unique(np.quantile(np.concatenate(predicted), 1 - np.array(SHARES)).astype(np.float32))
    kept, right = [], []
    for ids, _ in held_out:
        shares, counts = repeat(llm, ids, thresholds)
        kept.append(shares)
        right.append(counts)
        done()
    right = np.sum(right, axis=0)
    profile.curve = {
        "threshold": thresholds,
        "kept": np.mean(kept, axis=0).astype(np.float32),
        "quality": (right[:-1] / max(right[-1], 1)).astype(np.float32),
    }
    tokens = len(held_out) * STRETCHES * REPEATED
    about["repeated"] = {"texts": len(held_out), "tokens": tokens, "foretold_full": int(right[-1])}
    return profile


def report(profile):
    """What the held-out texts say, as a table."""
    about, curve = profile.about, profile.curve
    lines = [
        f"{about['model']}: held-out rank correlation {about['correlation']:.3f}; of {about['repeated']['tokens']} "
        f"tokens repeated from memory the full cache foretells {about['repeated']['foretold_full']}, and of these",
        "",
        "| threshold | kept | left |",
        "|---|---|---|",
    ]
    for threshold, kept, quality in zip(curve["threshold"], curve["kept"], curve["quality"], strict=True):
        lines.append(f"| {threshold:.2e} | {kept:.1%} | {quality:.3f} |")
    if about["repeated"]["foretold_full"] < EVIDENCE:
        lines += ["", f"Fewer than {EVIDENCE}: with this profile name a budget; a quality (or auto) is refused"]
    return "\n".join(lines)
