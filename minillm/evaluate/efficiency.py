"""What a cache costs and saves in time and memory: minillm.bench on the same configurations, in turn."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version

from minillm.compress.config import CacheConfig, unusual
from minillm.errors import MinillmError

GENERATED = 64  # tokens a repetition


def samples(lengths, repetitions):
    return [
        {"kind": "bench", "length": length, "generated": GENERATED, "repetitions": repetitions} for length in lengths
    ]


def run(setup, jobs):
    """The rows of Jobs, a list of one for each configuration: ttft, seconds to read the prompt, and tpot, seconds a
    token generated after it, of each repetition; bytes of the cache and of the process at its peak. Raises
    MinillmError."""
    for job in jobs:
        measured = [[] for _ in job.caches]
        for _ in range(job.sample["repetitions"]):  # a machine that slows down slows all of them
            for cache, found in zip(job.caches, measured, strict=True):
                found.append(_measure(setup, job.sample, CacheConfig(**cache)))
        yield [job.row(cache) | _row(found) for cache, found in zip(job.caches, measured, strict=True)]


def _measure(setup, sample, config):
    """(the rows of minillm.bench for the prompt and for a token after it, the seconds of each)"""
    n, depth = sample["generated"], sample["length"]
    (prompt,) = bench(setup, config, "-p", depth, "-n", 0)
    (token,) = bench(setup, config, "-p", 0, "-n", n, "-d", depth)
    return prompt, token, depth / prompt["avg_ts"], 1 / token["avg_ts"]


def _row(measured):
    prompts, tokens, ttft, tpot = zip(*measured, strict=True)
    times, prompt = {"ttft": ttft, "tpot": tpot}, prompts[-1]
    scores = {name: sum(values) / len(values) for name, values in times.items()}
    scores |= {"cache_bytes": prompt["cache_bytes"], "peak_bytes": max(row["peak_bytes"] for row in prompts + tokens)}
    machine = {name: prompt[name] for name in ("backend", "dtype", "cpu_info", "n_threads")}
    versions = {"minillm": version("minillm-engine"), "python": platform.python_version(), **machine}
    return {"kept": round(prompt["kept"], 6), "scores": scores, "times": times, "versions": versions}


def bench(setup, config, *flags):
    """The rows that python -m minillm.bench prints as JSON, of one repetition."""
    command = [sys.executable, "-m", "minillm.bench", "-o", "json", "-r", 1, *flags]
    command += ["--device", setup.device, "--dtype", setup.dtype, *cache_flags(config)]
    command += ["-m", setup.model] if setup.model else []
    command += ["-t", setup.threads] if setup.threads else []
    command += ["--offline"] if setup.offline else []
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise MinillmError(f"minillm.bench ended with status {done.returncode}: what it said is above")
    return json.loads(done.stdout)


def cache_flags(config):
    """A CacheConfig as flags."""
    cache = config.as_dict()
    values = unusual(cache)
    tau = values.pop("tau", None)
    budget = "full" if config.method == "full" else cache["budget"]
    flags = ["--kv-method", config.method, *(["--kv-budget", budget] if tau is None else ["--tau", tau])]
    for name, value in values.items():
        if name in ("dtype", "window", "sinks", "recompress"):
            flags += [f"--kv-{name}", value]
        else:
            flags += ["--kv-set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return flags
