"""The command line of the evaluation: flags -> samples and configurations -> rows in a file -> tables and plots."""

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path

from tqdm import tqdm

from minillm import ops
from minillm.compress.config import TABLES, CacheConfig
from minillm.compress.methods import find_method, methods_table
from minillm.errors import UsageError
from minillm.evaluate import efficiency, tables
from minillm.evaluate.commands import CELLS, FOLLOWING, LENGTHS, PROTOCOLS_OF, SUITE_SAMPLES, SUMMARIES, TASKS
from minillm.evaluate.evaluator import Job, Setup, identify, ready_methods
from minillm.evaluate.prompt import PROTOCOLS
from minillm.evaluate.store import KEY, Store, read_rows
from minillm.evaluate.workers import here, on_ray, processes
from minillm.programs import flags
from minillm.programs.bench import n_cores
from minillm.programs.run import guarded

DESCRIPTION = """\
How much of what a model has read survives in a compressed key-value cache.

Results go to a file, a line a sample; what is in it already is not computed again. Lists are comma-separated; flags may
also be repeated."""

EPILOG = """\
examples:
  python -m minillm.evaluate suite --out results.jsonl
  python -m minillm.evaluate answers --kv-method hindsight,foresight,kvzip --kv-budget 0.3,0.2,0.1 --kv-dtype auto,int8
  python -m minillm.evaluate needle --length 1024,4096 --kv-method semanticache,streaming --kv-budget 0.5,0.2
  python -m minillm.evaluate needle --kv-set chunking=delimiter,fixed:64,none       (a configuration for each value)
  python -m minillm.evaluate verbatim --task prose,code,numbers --protocol agnostic --kv-budget 0.2,0.1,0.05
  python -m minillm.evaluate ruler --task vt,niah_multikey_1 --tau 0.9,0.8,0.7 --protocol agnostic
  python -m minillm.evaluate longbench --task hotpotqa --data data.zip -m meta-llama/Meta-Llama-3-8B-Instruct
  python -m minillm.evaluate table results.jsonl --out tables
  python -m minillm.evaluate plot results.jsonl --out plots

exit status: 0 done, 1 it failed, 2 bad arguments, 130 ended by Ctrl-C; what is done is kept"""

BUDGETS = (0.5, 0.35, 0.2)
FILE = "results.jsonl"


def main(argv=None):
    """Runs the command line; -> exit status."""
    return guarded(_run, argv)


def _run(argv):
    args = _parser().parse_args(argv)
    if args.command in ("table", "plot"):
        return _show(args)
    if args.kv_method == ["list"]:
        print(methods_table())
        return 0
    ops.backend(args.device)
    setup, cells = _setup(args), CELLS[args.command](args)
    for _, sample, _ in cells:
        if sample["length"] is not None and sample["length"] < 1:
            raise UsageError(f"--length {sample['length']} is no number of tokens")
    model = identify(setup)
    caches = tuple(config.as_dict() for config in _configs(args, model["profile"]))
    with Store(args.out, _say) as store:
        jobs, n_done = [], 0
        for task, sample, protocol in cells:
            job = Job(task, sample, protocol, model, caches)
            left = tuple(cache for cache in caches if job.row(cache) not in store)
            n_done += len(caches) - len(left)
            if left:
                jobs.append(Job(task, sample, protocol, model, left))
        _compute(args, setup, jobs, store, n_done)
        asked = {_cell(*cell, model) for cell in cells}
        rows = [row for row in store.rows if _cell(*(row[name] for name in KEY[:-1])) in asked]
    print(tables.markdown(rows))
    return 0


def _cell(*decides):
    """All that decides a row but its cache, as one text: rows of other methods on the same samples belong together."""
    return json.dumps(decides, sort_keys=True)


def _compute(args, setup, jobs, store, n_done):
    n_left = sum(len(job.caches) for job in jobs)
    if n_done:
        _say(f"{store.path}: {n_done} results are there, {n_left} are to be computed")
    if not jobs:
        return
    with tqdm(total=n_done + n_left, initial=n_done, unit="result", disable=None, smoothing=0.1) as bar:
        for rows in _working(args, setup, jobs):
            for row in rows:
                store.add(row)
            bar.update(len(rows))


def _working(args, setup, jobs):
    if args.command == "efficiency":
        return efficiency.run(setup, jobs)
    if args.ray:
        return on_ray(setup, jobs, args.ray, args.workers, args.worker_cpus, args.worker_gpus)
    if (args.workers or 1) > 1:
        return processes(setup, jobs, args.workers, _say)
    return here(setup, jobs)


def _say(text):
    tqdm.write(f"minillm: {text}", file=sys.stderr)


def _show(args):
    rows = [row for path in args.file or [FILE] for row in _rows(path)]
    if not rows:
        raise UsageError(f"{', '.join(map(str, args.file or [FILE]))}: there are no results in it yet")
    if args.command == "plot":
        from minillm.evaluate import plots

        made = plots.draw(rows, args.out or Path("plots"))
        print("\n".join(map(str, made)) or "nothing to draw: see --help for what each picture needs")
        return 0
    print(tables.markdown(rows))
    if args.out:
        tables.write(rows, args.out)
    return 0


def _rows(path):
    rows, whole = read_rows(path)
    if whole < Path(path).stat().st_size:
        _say(f"{path}: the last line is damaged and left out")
    return rows


# Flags


def _parser():
    parser = flags.Parser(prog="minillm.evaluate", description=DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        _command(commands.add_parser(name, help=summary, description=summary), name)
    for name, summary in (
        ("table", "tables of results, as Markdown; with --out also as files, Markdown and CSV"),
        ("plot", "pictures of results, as PNG (needs the extra eval)"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("file", nargs="*", type=Path, help=f"of results (default: {FILE})")
        command.add_argument("--out", type=Path, metavar="FOLDER", help="where files go")
        command.add_argument("-v", "--verbose", action="store_true", help="show where an error came from")
    return parser


def _command(parser, name):
    _task_flags(parser.add_argument_group("task").add_argument, name)
    add = parser.add_argument_group("model").add_argument
    flags.model_flag(add)
    flags.machine_flags(add)
    group = parser.add_argument_group("key-value cache (the full one is always there to compare with)")
    _cache_flags(group.add_argument, name)
    _work_flags(parser.add_argument_group("work").add_argument, name)


def _task_flags(add, name):
    if name in TASKS:
        several, default = TASKS[name]
        add(
            "--task",
            **flags.several(_one_of(several), "NAME"),
            help=f"of {', '.join(several)}; default {', '.join(default) if default != several else 'all'}",
        )
    if name != "suite":
        add("--length", **flags.several(flags.positive, "N"), help=LENGTHS[name])
    if name == "needle":
        add(
            "--depth",
            **flags.several(_share, "D"),
            help="of the needle, 0 (first) to 1 (last); default: by lot, one a sample",
        )
    if name in FOLLOWING:
        n = FOLLOWING[name]
        add("--following", type=flags.positive, default=n, metavar="N", help=f"tokens that are scored (default {n})")
    if name == "efficiency":
        add("-r", "--repetitions", type=flags.positive, default=3, metavar="N", help="each after a warm-up (default 3)")
    else:
        default = SUITE_SAMPLES if name == "suite" else {"longbench": None}.get(name, 24)
        add(
            "-n",
            "--samples",
            type=flags.positive,
            default=default,
            metavar="N",
            help=f"in every cell of a table (default {default or 'all'})",
        )
    if name in PROTOCOLS_OF:
        protocols = PROTOCOLS_OF[name]
        add(
            "--protocol",
            **flags.several(_one_of(protocols), "NAME"),
            help="; ".join(f"{p}: {PROTOCOLS[p]}" for p in protocols) + f"; default {protocols[0]}",
        )
    if name not in ("longbench", "efficiency"):
        add("-s", "--seed", type=_natural, default=0, metavar="N", help="of the first sample (default 0)")
    if name in ("needle", "verbatim", "ruler", "suite"):
        add("--haystack", metavar="FILE", help="prose (a text or a folder of .txt files) in place of minillm's own")
    if name in ("answers", "perplexity", "fidelity", "suite"):
        add("--text", metavar="FILE", help="held-out text in place of minillm's own")
    if name == "longbench":
        add("--data", metavar="FILE", help="LongBench's data.zip, or the folder it was unpacked to (default: the Hub)")


def _cache_flags(add, name):
    add(
        "--kv-method",
        **flags.several(str, "NAME"),
        help=f"default: {'all that need no option' if name == 'suite' else 'semanticache'}; list: all of them",
    )
    add(
        "--kv-budget",
        **flags.several(flags.budget, "B"),
        help="shares kept (0.2), entries a head (1024); default 0.5,0.35,0.2",
    )
    add("--kv-memory", **flags.several(flags.share, "M"), help="shares of a full cache's memory instead (0.1, 10%%)")
    add("--tau", **flags.several(float, "T"), help="fixed thresholds instead")
    flags.cache_flags(add, lists=True)


def _work_flags(add, name):
    add("--out", default=FILE, metavar="FILE", help=f"the results, one JSON object a line (default {FILE})")
    if name != "efficiency":
        add(
            "--workers",
            type=flags.positive,
            metavar="N",
            help=f"processes, each with a model of its own (default {'one a core' if name == 'suite' else 1})",
        )
        add("--ray", metavar="ADDRESS", help="spread the work over a Ray cluster; local: one on this machine")
        add("--worker-cpus", type=flags.positive, default=1, metavar="N", help="of a worker on Ray (default 1)")
        add("--worker-gpus", type=float, default=0, metavar="X", help="of a worker on Ray (default 0)")
    add("-v", "--verbose", action="store_true", help="show where an error came from")


def _one_of(names):
    def convert(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return convert


def _share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def _natural(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _setup(args):
    if args.command == "suite" and args.workers is None and not args.ray:
        args.workers = n_cores()
    workers = getattr(args, "workers", None) or 1
    threads = args.threads
    if workers > 1 and threads is None:
        threads = args.worker_cpus if args.ray else max(1, n_cores() // workers)
    return Setup(
        args.model,
        args.device,
        args.dtype,
        threads,
        args.offline,
        *(getattr(args, name, None) for name in ("haystack", "text", "data")),
        processes=workers,
    )


def _configs(args, profile=None):
    """CacheConfigs: the full cache, and every method with every budget or tau and every value of --kv-set. An option
    goes to the methods that have it."""
    methods = args.kv_method or (ready_methods(profile) if args.command == "suite" else ["semanticache"])
    settings = [(name, value.split(",")) for name, _, value in (text.partition("=") for text in args.kv_set)]
    dtypes = args.kv_dtype or ["auto"]
    fulls = [CacheConfig("full"), *(CacheConfig("full", dtype=dtype) for dtype in dtypes)]
    configs, used = {repr(config): config for config in fulls}, set()
    for method in methods:
        find_method(method)
        combined = itertools.product(dtypes, *(values for _, values in settings))
        for dtype, *values in combined if method != "full" else ():
            chosen = {name: value for (name, _), value in zip(settings, values, strict=True) if name in TABLES}
            options = CacheConfig.option_table(method, **chosen) if _known(chosen) else {}
            named = {name: value for (name, _), value in zip(settings, values, strict=True) if name in options}
            used |= {*chosen, *named}
            taus = args.tau if args.tau and "tau" in options else []
            others = [("kv_memory", memory) for memory in args.kv_memory or ()] + [("tau", tau) for tau in taus]
            kept = [("kv_budget", budget) for budget in args.kv_budget or ([] if others else BUDGETS)]
            for name, value in kept + others:
                one = copy.copy(args)
                one.kv_method, one.kv_budget, one.kv_memory, one.tau, one.quality = method, None, None, None, None
                one.kv_dtype = dtype
                one.kv_set = [f"{option}={value}" for option, value in (chosen | named).items()]
                setattr(one, name, value)
                config = flags.cache_config(one)
                if config.method != "full":  # --kv-budget full: it is there
                    configs[repr(config)] = config
    if unused := [name for name, _ in settings if name not in used]:
        raise UsageError(f"--kv-set {unused[0]}: write OPTION=VALUE,... with an option of a method (--kv-method list)")
    return list(configs.values())


def _known(chosen):
    return all(value in TABLES[part] for part, value in chosen.items())
