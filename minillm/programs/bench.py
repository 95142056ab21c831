"""python -m minillm.bench: how fast a prompt is read (pp) and text generated (tg), as llama-bench has it, for each way
to keep the cache.

Each row is measured in a process of its own (minillm.programs.bench_row)."""

import argparse
import copy
import csv
import json
import os
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minillm import ops
from minillm.compress.config import unusual
from minillm.compress.methods import methods_table
from minillm.errors import MinillmError, UsageError
from minillm.files import hub
from minillm.files.stored_model import n_parameters, open_model
from minillm.programs import cli, flags
from minillm.programs.flags import several
from minillm.programs.run import guarded
from minillm.programs.terminal import count, size
from minillm.text.tokenizer import Tokenizer

KEPT = ("kv_budget", "kv_memory", "tau")  # flags that say how much is kept

DESCRIPTION = """\
Measure how fast prompts are read and tokens generated, for each model and each way to keep the key-value cache.

pp N: N tokens are read at once. tg N: N tokens are read one by one, as when they are generated. @ dD: after D tokens
that are there already. Lists are comma-separated; flags may also be repeated. What is read is real text, since random
tokens have no delimiters: Python's language reference, as it comes with Python, or the file of -f."""

EPILOG = """\
examples:
  python -m minillm.bench
  python -m minillm.bench -p 512,2048,7000 -n 0 --kv-budget full,0.2
  python -m minillm.bench -p 0 -n 64 -d 512,2048,7000 --kv-budget full,0.2 --kv-method semanticache,streaming
  MINILLM_CPU=avx512 python -m minillm.bench -o json

columns:
  t/s       tokens a second, mean and standard deviation over repetitions; ms: milliseconds a token
  floor ms  the time to read the weights and the cache once at the bandwidth measured beside it; x floor: a token's
  GB/s      weights and cache read a token, in its time; of: the bandwidth measured
  cache     pages at the end of the row; kept: entries in them, of those a full cache would have
  start s   from the start of a process to the first token of a prompt of all tokens of the row (tg: of D)"""

CHARACTERS = 8  # more than a token of prose takes on average: what of a long text is encoded at first
COLUMNS = "cache, test, t/s, ms, floor ms, x floor, GB/s, of, cache MiB, kept, load s, start s, peak MiB".split(", ")


@dataclass(frozen=True)
class Test:
    kind: str  # "pp" or "tg"
    n: int
    depth: int

    @property
    def name(self):
        return f"{self.kind} {self.n}" + (f" @ d{self.depth}" if self.depth else "")


def main(argv=None):
    """Runs the command line; -> exit status."""
    return guarded(_run, argv)


def _run(argv):
    args = _parser().parse_args(argv)
    if args.kv_method == ["list"]:
        print(methods_table())
        return 0
    ops.backend(args.device)
    caches, tests = _caches(args), _tests(args)
    text, source = _text(args.file)
    rows = []
    with open(args.output_file, "w", encoding="utf-8") if args.output_file else nullcontext(sys.stdout) as out:
        for name in args.model or [None]:
            rows += _measure_model(name, args, caches, tests, text, source, out)
        if args.output == "json":
            print(json.dumps(rows, indent=2), file=out)
        elif args.output == "csv":
            _print_csv(rows, out)
    return 0


# Arguments


def _parser():
    parser = flags.Parser(prog="minillm.bench", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument_group("model").add_argument
    flags.model_flag(add, action="append", help=f"as for minillm; repeatable (default: {hub.DEFAULT_MODEL})")
    flags.machine_flags(add)
    add = parser.add_argument_group("what is measured").add_argument
    add("-p", "--n-prompt", **several(_count, "N"), help="pp N; 0: none (default 512)")
    add("-n", "--n-gen", **several(_count, "N"), help="tg N; 0: none (default 128)")
    add("-d", "--n-depth", **several(_count, "D"), help="after D tokens (default 0)")
    add("-r", "--repetitions", type=flags.positive, default=5, metavar="N", help="after one to warm up (default 5)")
    add("-f", "--file", metavar="FILE", help="the text that is read (UTF-8)")
    add = parser.add_argument_group("key-value cache").add_argument
    add("--kv-method", **several(str, "NAME"), help="default: the model's; list: all")
    add(
        "--kv-budget",
        **several(flags.budget, "B"),
        help="shares kept (0.2), entries a head (1024), full; default full,0.5",
    )
    add("--kv-memory", **several(flags.share, "M"), help="shares of a full cache's memory (0.1, 10%%), a row each")
    add("--tau", **several(float, "T"), help="fixed thresholds, a row each")
    flags.cache_flags(add)
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", choices=("md", "csv", "json"), default="md", help="default: md")
    add("--output-file", metavar="FILE", help="default: stdout")
    add("-v", "--verbose", action="store_true", help="show where an error came from")
    return parser


def _count(text):
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def _caches(args):
    """label -> keywords of a CacheConfig, for each method with each budget and tau."""
    kept = [(name, value) for name in KEPT for value in getattr(args, name) or ()]
    kept = kept or [("kv_budget", "full"), ("kv_budget", None)]  # None: the method's default
    caches = {}
    for method in args.kv_method or [None]:
        for name, value in kept:
            one = copy.copy(args)
            one.kv_method, one.quality = method, None
            for other in KEPT:
                setattr(one, other, value if other == name else None)
            config = flags.cache_config(one)
            full = {"method": "full", "dtype": config.dtype}
            caches[_label(config)] = full if config.method == "full" else config.as_dict()
    return caches


def _label(config):
    cache = config.as_dict()
    values = unusual(cache)
    budget = cache["budget"] or values.pop("quality", None)
    named = [f"{name}={value}" for name, value in values.items()]
    return " ".join([config.method or "default", *([] if budget is None else [str(budget)]), *named])


def _tests(args):
    lengths = [("pp", n) for n in args.n_prompt or [512]] + [("tg", n) for n in args.n_gen or [128]]
    tests = [Test(kind, n, depth) for kind, n in lengths for depth in args.n_depth or [0] if n]
    if not tests:
        raise UsageError("nothing is left to measure: give -p or -n more than 0")
    return tests


def _text(file):
    """(text, what it is)"""
    if file:
        return cli.read_text(file, "-f"), file
    return "\n\n".join(pydoc_data.topics.topics.values()), f"the language reference of Python {_python()}"


# Measuring


def _measure_model(name, args, caches, tests, text, source, out):
    """The rows of one model; in Markdown they go to `out` as they come."""
    stored = open_model(hub.resolve(name, offline=args.offline))
    config = stored.config
    longest = max(test.n + test.depth for test in tests)
    if longest > config.context:
        raise UsageError(
            f"{config.name} reads {config.context} tokens, and -d with -p or -n comes to {longest}: lower one"
        )
    ids = _encode(stored, text, longest, source)
    load = flags.machine(args) | {"offline": True}
    common = {
        "model": config.name,
        "model_n_params": n_parameters(config),
        "cpu_info": cpu_name(),
        "n_threads": args.threads or n_cores(),
        "text": source,
    }
    rows = []
    with tqdm(total=len(caches) * len(tests) * (1 + args.repetitions), leave=False, disable=None) as bar:
        for test in tests:
            for label, cache in caches.items():
                bar.set_description(f"{label}, {test.name}")
                request = {"model": str(stored.path), "load": load, "cache": cache, "repetitions": args.repetitions}
                request |= {"kind": test.kind, "depth": test.depth, "ids": ids[: test.depth + test.n]}
                found = _measure_row(request, bar)
                rows.append(common | {"cache": label, "test": test.name} | _row(test, found))
                if args.output == "md":
                    _print_markdown(rows, out)
    return rows


def _encode(stored, text, n, source):
    """The first n token ids of the text."""
    tokenizer = Tokenizer.of(stored)
    if tokenizer is None:
        raise MinillmError(f"{stored.name} has no tokenizer, and what is read is a text: add its tokenizer.json")
    ids = tokenizer.encode(text[: n * CHARACTERS])
    if len(ids) < n:
        ids = tokenizer.encode(text)
    if len(ids) < n:
        raise UsageError(f"{source} has {len(ids)} tokens, and {n} are to be read: give a longer text with -f")
    return ids[:n]


def _measure_row(request, bar):
    """What a fresh process answers to the request (see bench_row), `seconds` a list, and first_token_seconds."""
    start, found = time.perf_counter(), {"seconds": []}
    command = [sys.executable, "-m", "minillm.programs.bench_row"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        with suppress(BrokenPipeError), process.stdin as stdin:  # one that died before it listened has a status
            json.dump(request, stdin)
        for line in process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise MinillmError(answer["error"])
            if "first_token" in answer:
                found["first_token_seconds"] = time.perf_counter() - start
                bar.update()
            elif "seconds" in answer:
                found["seconds"].append(answer["seconds"])
                bar.update()
            else:
                found |= answer
    if process.returncode:
        raise MinillmError(
            f"the process that measured this row ended with status {process.returncode}: what it said is above; "
            "-9 is most often a lack of memory"
        )
    return found


def _row(test, found):
    """The figures of a row by name: those that llama-bench has, with its names."""
    seconds = found.pop("seconds")
    samples = [test.n / s for s in seconds]
    row = {
        "n_prompt": test.n if test.kind == "pp" else 0,
        "n_gen": test.n if test.kind == "tg" else 0,
        "n_depth": test.depth,
        "avg_ts": statistics.mean(samples),
        "stddev_ts": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "samples_ts": samples,
        **found,
    }
    if test.kind == "tg":
        n_bytes, token = found["weight_bytes"] + found["cache_bytes"], statistics.mean(seconds) / test.n
        floor = n_bytes / found["bandwidth"]
        row |= {"achieved": n_bytes / token, "floor_seconds": floor, "floors": token / floor}
    return row


# Output


def _print_markdown(rows, out):
    """The last row, and before the first what all rows of the model share."""
    row = rows[-1]
    if len(rows) == 1:
        about = f"{row['model']}: {count(row['model_n_params'])} parameters, {row['dtype']}, {row['backend']}, "
        about += f"{row['n_threads']} threads, {row['cpu_info']}; {size(row['weight_bytes'])} of weights read a token; "
        about += f"text: {row['text']}"
        tqdm.write(f"{about}\n\n| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|", file=out)
    cells = [row["cache"], row["test"], f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}", f"{1000 / row['avg_ts']:.2f}"]
    if "floors" in row:
        cells += [f"{1000 * row['floor_seconds']:.2f}", f"{row['floors']:.2f}", f"{row['achieved'] / 1e9:.1f}"]
    else:
        cells += ["", "", ""]
    cells += [f"{row['bandwidth'] / 1e9:.1f}", f"{row['cache_bytes'] / 2**20:.1f}", f"{row['kept']:.3f}"]
    cells += [f"{row['load_seconds']:.2f}", f"{row['first_token_seconds']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
    tqdm.write(f"| {' | '.join(cells)} |", file=out)
    out.flush()


def _print_csv(rows, out):
    flat = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows]
    table = csv.DictWriter(out, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)


def cpu_name():
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def n_cores():
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _python():
    return ".".join(platform.python_version_tuple()[:2])


if __name__ == "__main__":
    sys.exit(main())
