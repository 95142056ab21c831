"""One process's share of an evaluation: a model, and samples that become rows."""

import hashlib
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import numpy as np

from minillm.compress.config import CacheConfig
from minillm.compress.methods import METHODS
from minillm.errors import UsageError
from minillm.evaluate import answers, continuation, longbench, needles, ruler, verbatim
from minillm.evaluate.scoring import score
from minillm.evaluate.text import read_haystack, read_text
from minillm.files import hub
from minillm.files.profile_file import find as find_profile
from minillm.files.stored_model import open_model
from minillm.llm import LLM


@dataclass(frozen=True)
class Setup:
    """What every worker needs to know. None: the default model, the texts that come with minillm."""

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    offline: bool = False
    haystack: str | None = None
    text: str | None = None
    data: str | None = None  # LongBench's
    processes: int = 1  # that share this machine's memory


@dataclass(frozen=True)
class Job:
    """A sample, and the configurations that are still to be scored on it; they share its prefill."""

    task: str
    sample: dict
    protocol: str
    model: dict = field(repr=False)
    caches: tuple[dict, ...]  # CacheConfig.as_dict

    def row(self, cache):
        """What decides the row of a configuration (store.KEY)."""
        return {
            "task": self.task,
            "sample": self.sample,
            "protocol": self.protocol,
            "model": self.model,
            "cache": cache,
        }


def identify(setup):
    """{"name", "sha256", "dtype", "profile"} of the model. sha256: of the digest of config and weights, and of the
    vocabulary and chat template. profile: digest of its profile, or None."""
    stored = open_model(hub.resolve(setup.model, offline=setup.offline))
    digest = hashlib.sha256(stored.digest.encode())
    if stored.metadata is not None:
        digest.update(repr(sorted(stored.metadata.items())).encode())
    else:
        for path in sorted(stored.path.iterdir()):
            if path.suffix in (".json", ".jinja", ".model"):
                digest.update(path.name.encode() + path.read_bytes())
    profile = find_profile(stored)
    return {
        "name": stored.name,
        "sha256": digest.hexdigest()[:16],
        "dtype": setup.dtype,
        "profile": profile and profile.digest,
    }


def ready_methods(profile):
    """The methods of the table that need no option, the full cache among them. profile: whether the model has one."""
    ready = []
    for name in METHODS:
        with suppress(UsageError):
            if not CacheConfig(name).predicts or profile:
                ready.append(name)
    return ready


class Evaluator:
    def __init__(self, setup):
        self.setup = setup
        self.llm = LLM.load(
            setup.model,
            cache=CacheConfig("full"),
            device=setup.device,
            dtype=setup.dtype,
            threads=setup.threads,
            offline=setup.offline,
        )
        ops = self.llm.model.ops
        self.versions = {
            "minillm": version("minillm-engine"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "backend": ops.name,
            "cache_dtype": ops.page_format.name,
        }

    def run(self, job):
        """The rows of a Job. Raises MinillmError."""
        prompt = self.prompt(job.task, job.sample)
        configs = [CacheConfig(**cache) for cache in job.caches]
        results = score(self.llm, prompt, configs, job.protocol, self.setup.processes)
        sizes = {
            "context": len(prompt.context),
            "question": len(prompt.question),
            "answer": len(prompt.answer) or (prompt.asked.max_tokens if prompt.asked else 0),
        }
        return [
            job.row(cache)
            | {name: round(result[name], 6) for name in ("kept", "memory")}
            | {"tokens": sizes}
            | self._found(job, prompt, result)
            for cache, result in zip(job.caches, results, strict=True)
        ]

    def _found(self, job, prompt, result):
        found = {"scores": {name: round(value, 6) for name, value in result["scores"].items()}}
        if "prediction" in result:
            found["prediction"] = result["prediction"]
        if "layers" in result:
            share = result["lengths"] / (len(prompt.context) + len(prompt.question))
            found |= {"layers": np.round(result["layers"], 6).tolist(), "heads": np.round(share, 4).tolist()}
        return found | {"versions": self.versions}

    def prompt(self, task, sample):
        setup = self.setup
        make = {
            "answers": lambda llm, sample: answers.prompt(llm, sample, answers.text_of(sample["kind"], setup.text)),
            "needle": lambda llm, sample: needles.prompt(
                llm, sample, read_haystack(needles.haystack_of(sample["kind"]), setup.haystack)
            ),
            "verbatim": lambda llm, sample: verbatim.prompt(llm, sample, read_haystack(sample["kind"], setup.haystack)),
            "ruler": partial(ruler.prompt, text=read_text(setup.haystack)),
            "longbench": partial(longbench.prompt, data=setup.data, offline=setup.offline),
            "perplexity": partial(continuation.prompt, text=read_text(setup.text, "heldout.txt")),
            "fidelity": partial(continuation.prompt, text=read_text(setup.text, "heldout.txt"), fidelity=True),
        }
        return make[task](self.llm, sample)
