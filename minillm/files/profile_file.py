"""Profile: the map of one model, its file, and where files are looked for.

In every layer the score of a token in a head is w . h + b: h is the normalised hidden state that the head's query, key
and value are made from, and the score is the log of the largest attention that the token gets from that head when the
text is read a second time. So a profile is a fourth projection beside W_Q, W_K and W_V, one number a head. To it comes
the log of what an entry of the head is worth beside those of others (minillm.profile.worth)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError
from minillm.files import own_file
from minillm.files.formats import FLOATS
from minillm.files.stored_model import StoredModel
from minillm.files.weights import load_weights
from minillm.ops import say_once

FORMAT = 2
SUFFIX = ".profile"
EVIDENCE = 1000  # tokens that a curve is measured on: were each for itself, these know a quality of .99 to .003


@dataclass
class Profile:
    """weight (L, H, dim), bias and worth (L, H) float32. curve: name -> (m,) float32 for m thresholds, ascending:
    "threshold", a score; "kept", the share of the entries that reach it; "quality", the share of the full cache's token
    accuracy that is left then when held-out texts are repeated from memory. about: plain values: model, fingerprint,
    date, versions, texts, held-out rank correlation, and of what was repeated how many texts and tokens, and how many
    of those the full cache foretold ("foretold_full"), which is what "quality" is a share of."""

    weight: np.ndarray
    bias: np.ndarray
    worth: np.ndarray
    curve: dict[str, np.ndarray]
    about: dict

    @property
    def projection(self):
        """(weight, bias) of what is predicted, what entries are worth included."""
        return self.weight, self.bias + self.worth

    @property
    def digest(self):
        """Of what it predicts."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.projection)).hexdigest()[:16]

    def threshold(self, quality):
        """The highest threshold at which, and at all below which, at least `quality` was left. MinillmError where there
        is none, or where fewer than EVIDENCE tokens would have to say that: a budget needs no curve."""
        if (measured := self.about["repeated"]["foretold_full"]) < EVIDENCE:
            raise MinillmError(
                f"the profile of {self.about['model']} was measured on {measured} tokens, and to keep a quality takes "
                f"{EVIDENCE} at least: name a budget, or make one of more texts by python -m minillm.profile --texts"
            )
        short = np.flatnonzero(self.curve["quality"] < quality)
        reached = self.curve["threshold"][: short[0] if len(short) else None]
        if not len(reached):
            best = float(self.curve["quality"].max())
            raise MinillmError(
                f"the profile of {self.about['model']} knows no threshold that leaves {quality:g} of the quality (the "
                f"best leaves {best:.3f}): ask for less, or name a budget"
            )
        return float(reached[-1])

    def save(self, path):
        """Write the file, all of it or nothing: the projections in 16 bits, which is more than their fit knows. Raises
        MinillmError."""
        arrays = {"weight": self.weight.astype(np.float16), "bias": self.bias, "worth": self.worth} | self.curve
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MinillmError(f"cannot write {path} ({error}): name another file") from error
        own_file.write(path, arrays, {"minillm_profile": json.dumps({"format": FORMAT} | self.about)})


CURVE = ("threshold", "kept", "quality")
REMEDY = "make one with python -m minillm.profile, or take that file away"


def load(path):
    """The Profile of a file. Raises MinillmError for what is none."""
    arrays, texts = own_file.read(path, "profile", REMEDY)
    try:
        about = json.loads(texts["minillm_profile"])
        if not isinstance(about, dict):
            raise ValueError("it does not say what model it is of")
        if about.pop("format") != FORMAT:
            raise ValueError("another version of minillm wrote it")
        weight, bias, worth = arrays.pop("weight").astype(np.float32), arrays.pop("bias"), arrays.pop("worth")
        profile = Profile(weight, bias, worth, {name: arrays[name] for name in CURVE}, about)
        _check(profile)
    except (KeyError, TypeError, ValueError) as error:
        raise MinillmError(f"{path} is not a minillm profile ({error}): {REMEDY}") from None
    return profile


def _check(profile):
    """Raise ValueError where the parts of a Profile do not fit one another."""
    weight, bias, worth, curve = profile.weight, profile.bias, profile.worth, profile.curve
    if weight.ndim != 3 or len({bias.shape, worth.shape, weight.shape[:2]}) > 1:
        raise ValueError(f"its weight {weight.shape}, bias {bias.shape} and worth {worth.shape} do not fit one another")
    thresholds = curve["threshold"]
    if thresholds.ndim != 1 or not len(thresholds) or any(part.shape != thresholds.shape for part in curve.values()):
        raise ValueError(f"its curve is not {', '.join(CURVE)} of as many thresholds each, one at least")
    if not all(np.isfinite(array).all() for array in (weight, bias, worth, *curve.values())):
        raise ValueError("it holds NaN or infinity")
    if (np.diff(thresholds) <= 0).any():
        raise ValueError("the thresholds of its curve do not ascend")
    if missing := {"model", "fingerprint"} - profile.about.keys():
        raise ValueError(f"it does not say its {' and '.join(sorted(missing))}")
    repeated = profile.about.get("repeated")
    if not isinstance(repeated, dict) or not isinstance(repeated.get("foretold_full"), int):
        raise ValueError("it does not say how many tokens its curve was measured on")


def fingerprint(config, norms):
    """Of a model by its shape and the weights of its norms (2 L, dim) float32, each layer's before the attention and
    before the MLP: the same in every file format and every quantisation."""
    c = config
    digest = hashlib.sha256(repr((c.n_layers, c.dim, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim)).encode())
    for norm in norms:
        digest.update(np.ascontiguousarray(norm, np.float32).tobytes())
    return digest.hexdigest()[:16]


def places(mark, path):
    """Where the profile of the model with the fingerprint `mark` and the files at `path` may lie, first choice first:
    beside the model, in the user's cache, in this package. The first is taken, whatever the others were made from: who
    made it for a model meant it. (How much it knows of a quality is asked where one is: Profile.threshold.)"""
    beside = path / f"minillm{SUFFIX}" if path.is_dir() else path.with_name(path.name + SUFFIX)
    return [
        beside,
        place_of_users(mark),
        Path(__file__).parents[1] / "profile" / "data" / (mark + SUFFIX),
    ]


def place_of_users(mark):
    """Where a new profile goes: the one of `places` in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("minillm", appauthor=False) / "profiles" / (mark + SUFFIX)


def norm_names(config):
    """Of the weights that `fingerprint` takes, in its order."""
    layers = range(config.n_layers)
    return [f"model.layers.{i}.{norm}_layernorm.weight" for i in layers for norm in ("input", "post_attention")]


def find(stored: StoredModel, name=None):
    """The Profile of a model, or None where there is none. name: of a file that was asked for: MinillmError where it is
    no profile of this model. Where none was asked for, such a file is passed over with a line on stderr: it must not
    stop what can do without it."""
    names = norm_names(stored.config)
    norms = load_weights(stored, dtype="stored", only=set(names).__contains__)
    mark = fingerprint(stored.config, [norms[name].data for name in names])
    if name:
        return _load_for(stored, mark, Path(name).expanduser())
    for place in places(mark, stored.path):
        if place.is_file():
            try:
                return _load_for(stored, mark, place)
            except MinillmError as error:
                say_once(f"minillm: passed over: {error}")
    return None


def _load_for(stored, mark, path):
    """`load` for a model with the fingerprint `mark`. A fine-tune may have left the norms alone. Where the profile was
    made from files of the same format, other bytes are other weights; blocks may also have been quantised in another
    way. From files of another format a fine-tune cannot be told."""
    found, config = load(path), stored.config
    about, shape = found.about, (config.n_layers, config.n_kv_heads, config.dim)
    if about["fingerprint"] != mark:
        raise MinillmError(f"{path} is the profile of {about['model']}, not of {config.name}: {REMEDY}")
    if found.weight.shape != shape:
        raise MinillmError(f"{path} is damaged (its weight is {found.weight.shape}, not {shape}): {REMEDY}")
    made_from, here = about.get("weights"), stored.digest
    if made_from and made_from != here and made_from.split()[:-1] == here.split()[:-1]:
        reason = f"{path} was made from other weights than these of {config.name}, which have the same norms"
        if set(here.split()[1:-1]) <= {format.name for format in FLOATS}:
            raise MinillmError(f"{reason}: {REMEDY}")
        say_once(f"minillm: {reason}: another quantisation, or a fine-tune that wants a profile of its own")
    return found
