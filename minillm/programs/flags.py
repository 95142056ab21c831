"""Flags that programs share, and the settings of the library that they name."""

import argparse

from minillm.compress.config import TABLES, CacheConfig
from minillm.engine.admission import DTYPES
from minillm.errors import UsageError
from minillm.files.formats import QUANTIZED
from minillm.files.hub import DEFAULT_MODEL
from minillm.ops.pages import DTYPES as KV_DTYPES
from minillm.sampling import SamplingParams


class Parser(argparse.ArgumentParser):
    """Keeps the lines of its texts, takes flags in full only, and raises UsageError where argparse would print its
    usage and leave."""

    def __init__(self, **settings):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": formatter, "allow_abbrev": False} | settings)

    def error(self, message):
        if message.startswith("unrecognized"):
            message += " (--help lists the options; a text of several words wants quotes)"
        raise UsageError(message)


def model_flag(add, **settings):
    """-m of every program that loads a model, which is llama.cpp's -hf too. add: add_argument of a group."""
    what = f"a Hub repository (owner/name, owner/name:Q4_K_M), a folder or a .gguf file (default: {DEFAULT_MODEL})"
    add("-m", "--model", "-hf", "--hf-repo", **{"metavar": "MODEL", "help": what} | settings)


def context_flag(add):
    add("-c", "--ctx-size", type=positive, metavar="N", help="longest sequence in tokens (default: the model's)")


def template_flag(add):
    add("--chat-template", metavar="NAME", help="chatml, llama2, llama3, mistral, zephyr, or a file with a template")


def sampling_flags(add, temperature="0: greedy (the default)"):
    """How an answer is drawn, and how long it may be."""
    length = ("-n", "--max-tokens", "--n-predict", "--max-new-tokens")
    add(*length, type=_sampling("max_tokens", _length), metavar="N", help="at most N tokens (default, or -1: no limit)")
    add("--temp", "--temperature", type=_sampling("temperature", float), metavar="T", help=temperature)
    add("--top-k", type=_sampling("top_k", int), metavar="K", help="sample from the K likeliest tokens; 0: all")
    add("--top-p", type=_sampling("top_p", float), metavar="P", help="... from the fewest that reach probability P")
    add("--min-p", type=_sampling("min_p", float), metavar="P", help="... from those at least P times the likeliest")
    add("--repeat-penalty", type=_sampling("repeat_penalty", float), metavar="X", help="of the last 64 tokens; 1: none")
    add("--presence-penalty", type=_sampling("presence_penalty", float), metavar="X", help="of tokens in the answer")
    add("--frequency-penalty", type=_sampling("frequency_penalty", float), metavar="X", help="each time they came")
    add("-s", "--seed", type=_sampling("seed", int), metavar="N", help="of the random numbers (default: a new one)")


def machine_flags(add):
    """The flags of every program that loads a model. add: add_argument of a group."""
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--dtype", default="auto", choices=DTYPES, help="how weights are held: float32 (fast), stored (small), or auto")
    add("--quantize", choices=QUANTIZED, help="turn 16- and 32-bit weights into blocks at load; the head into q8_0")
    add("-t", "--threads", type=positive, metavar="N", help="threads (default: one a core)")
    add("--offline", action="store_true", help="fetch nothing")


def machine(args):
    """The keywords of LLM.load that the flags of `machine_flags` name."""
    return {name: getattr(args, name) for name in ("device", "dtype", "quantize", "threads", "offline")}


def method_flags(add):
    """The method of a cache, and how much it keeps."""
    add("--kv-method", metavar="NAME", help="default: foresight, without a profile hindsight; list: all, with papers")
    add(
        "--kv-budget",
        type=budget,
        metavar="B",
        help="share of the entries kept (0.2, 20%%), entries a head (1024), auto or full; default 0.3",
    )
    add("--kv-memory", type=share, metavar="M", help="share of a full cache's memory instead (0.1, 10%%)")
    add("--quality", type=float, metavar="Q", help="share of recall to be left instead (foresight; auto is 0.99)")
    add("--tau", type=float, help="a fixed threshold instead (semanticache): what is kept is then the outcome")
    add("--profile", metavar="FILE", help="of python -m minillm.profile (default: found by itself)")


def cache_flags(add, lists=False):
    """The flags of a cache beside its method and how much that keeps. lists: of a program that takes several dtypes."""
    add(
        "--kv-dtype",
        **(several(kv_dtype, "TYPE") if lists else {"type": kv_dtype, "metavar": "TYPE"}),
        help="of keys and values in memory: " + ", ".join(f"{name} ({gives})" for name, gives in KV_DTYPES.items()),
    )
    add("--kv-window", type=int, metavar="N", help="newest tokens kept as they are (default 8, of most methods 32)")
    add("--kv-sinks", type=int, metavar="N", help="first tokens kept as they are (default 4)")
    add("--kv-recompress", type=int, metavar="N", help="compress the answer every N tokens; 0: never (default 256)")
    add("--kv-set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method (repeatable)")


# Values


def at_least(least):
    """The type of a flag that is a whole number, of `least` or more."""

    def convert(text):
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    convert.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
    return convert


positive = at_least(1)


def _length(text):
    return None if text == "-1" else int(text)  # -1: llama.cpp's word for "no limit"


def _sampling(name, kind):
    """An argparse type: a value that SamplingParams takes for `name`."""

    def convert(text):
        value = kind(text)
        try:
            SamplingParams(**{name: value})
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    convert.__name__ = "number" if kind is float else "whole number"  # argparse: "invalid whole number value: 'x'"
    return convert


def kv_dtype(text):
    if text not in KV_DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(KV_DTYPES)}")
    return text


def share(text):
    """A share: 0.1 or 10%."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def budget(text):
    if text in ("full", "auto"):
        return text
    if text == "1":
        raise argparse.ArgumentTypeError("1 could be a share or an entry: write full, or at least 2 entries a head")
    try:
        return int(text) if text.lstrip("+-").isdecimal() else share(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a share such as 0.2 or 20%, nor entries a head such as 1024, nor auto, nor full"
        ) from None


def sampling_params(args):
    """The SamplingParams that the flags of an answer name. Raises UsageError."""
    wanted = {
        "max_tokens": args.max_tokens,
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "seed": args.seed,
        "stop": getattr(args, "stop", None),
    }
    for name in ("top_k", "top_p", "min_p"):
        if wanted[name] is not None and args.temp is None:
            raise UsageError(
                f"--{name.replace('_', '-')} means nothing to greedy decoding: add --temp, such as --temp 0.8"
            )
    given = {name: value for name, value in wanted.items() if value is not None}
    return SamplingParams(**given)


def cache_config(args):
    """The CacheConfig that the --kv flags and --tau name. Raises UsageError."""
    texts = {}
    for text in args.kv_set:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--kv-set {text}: write OPTION=VALUE; --kv-method list shows the options of each method")
        if name in texts:
            raise UsageError(f"--kv-set {name} is given twice: leave one out")
        texts[name] = value
    chosen = {name: value for name, value in texts.items() if name in TABLES}
    options, method = dict(chosen), args.kv_method
    if args.tau is not None and method is None:
        method = "semanticache"  # the method that has one
    if all(name in TABLES[part] for part, name in chosen.items()):
        table = CacheConfig.option_table(method, **chosen)
        for name in texts.keys() - chosen.keys():
            if name not in table:
                raise UsageError(f"--kv-set {name}: {CacheConfig.lacks(method, name, **chosen)}")
            options[name] = _option(table[name], texts[name])
    if args.tau is not None:
        if "tau" in options:
            raise UsageError("--tau and --kv-set tau= are the same: leave one out")
        options["tau"] = args.tau
    common = {
        "quality": args.quality,
        "memory": args.kv_memory,
        "dtype": args.kv_dtype,
        "window": args.kv_window,
        "sinks": args.kv_sinks,
        "recompress": args.kv_recompress,
    }
    common = {name: value for name, value in common.items() if value is not None}
    return CacheConfig(method, args.kv_budget, **common, **options)


def _option(option, text):
    """The value that the option takes of what `text` may mean: itself, true or false, a number. What it refuses is left
    as text, for CacheConfig to say so."""
    values = [text]
    if text in ("true", "false"):
        values.append(text == "true")
    for number in (int, float):
        try:
            values.append(number(text))
        except ValueError:
            pass
    for value in values:
        try:
            return option.check(value)
        except ValueError:
            pass
    return text


def several(kind, name):
    """For add_argument: comma-separated values of a type, which `--help` calls by a name."""

    def convert(text):
        return [kind(part) for part in text.split(",")]

    convert.__name__ = "comma-separated"  # argparse: "invalid comma-separated value: '1,x'"
    return {"type": convert, "action": "extend", "metavar": f"{name},..."}
