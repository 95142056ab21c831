"""The command line of minillm: flags and texts, checked before a model is loaded."""

import argparse
import os
import sys
from pathlib import Path

from minillm import ops
from minillm.compress.config import TABLES, CacheConfig
from minillm.errors import UsageError
from minillm.files.formats import QUANTIZED
from minillm.files.hub import DEFAULT_MODEL
from minillm.llm import DTYPES
from minillm.ops.pages import DTYPES as KV_DTYPES
from minillm.sampling import SamplingParams
from minillm.text.chat_template import ChatTemplate, find_template

DESCRIPTION = """\
Complete a text or chat with a Llama or Mistral model whose key-value cache is compressed.

Without a text: a chat on a terminal; what is piped in is read as the prompt."""

EXAMPLES = """\
examples:
  minillm                                             chat with the default model
  minillm "Why is the sky blue?" -n 100
  minillm -f report.txt -p "What was decided?" --kv-budget 0.2 --prompt-cache report.cache
  git diff | minillm -f - -p "A commit message for this:"
  minillm --raw -p "Once upon a time" -n 50 --temp 0.8 -s 1

exit status: 0 done, 1 it failed, 2 bad arguments, 130 ended by Ctrl-C"""


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


def parse(argv):
    """Arguments -> a namespace with every flag, and made of them: params (SamplingParams), cache (CacheConfig),
    document and prompt (texts or None), chat (bool: an interactive chat). Raises UsageError; `--help` leaves."""
    args = _parser().parse_args(argv)
    if args.kv_method == "list":
        return args
    args.cache = cache_config(args)
    args.params = _params(args)
    ops.backend(args.device)
    if args.chat_template is not None:
        ChatTemplate(find_template(args.chat_template))
    args.document, args.prompt = _texts(args)
    args.chat = args.document is None and args.prompt is None
    if args.chat and (args.json or args.raw):
        raise UsageError(f"{'--json' if args.json else '--raw'} needs a text: give -p TEXT, -f FILE or pipe one in")
    if args.raw and args.system is not None:
        raise UsageError("-sys/--system-prompt is a part of a chat, and --raw is none: leave one of them out")
    if args.raw and args.chat_template is not None:
        raise UsageError("--chat-template is for a chat, and --raw is none: leave one of them out")
    if args.prompt_cache is not None:
        args.prompt_cache = args.prompt_cache.expanduser()
        _check_prompt_cache(args.prompt_cache)
    return args


def _parser():
    parser = Parser(prog="minillm", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the prompt, as with -p")
    add = parser.add_argument_group("model").add_argument
    model_flag(add)
    add("-c", "--ctx-size", type=positive, metavar="N", help="longest sequence in tokens (default: the model's)")
    machine_flags(add)

    add = parser.add_argument_group("prompt").add_argument
    add("-p", "--prompt", metavar="TEXT", dest="prompt_text", help="the prompt; - reads stdin")
    add("-f", "--file", metavar="FILE", help="a document (UTF-8; - is stdin) that goes before the prompt")
    add("-sys", "--system-prompt", metavar="TEXT", dest="system", help="default: the chat template's own")
    add("--raw", "-no-cnv", action="store_true", help="complete the text as it stands, without the chat template")
    add("--chat-template", metavar="NAME", help="chatml, llama2, llama3, mistral, zephyr, or a file with a template")
    add(
        "--prompt-cache",
        type=Path,
        metavar="FILE",
        help="keep what was read: the document of -f, else the prompt, or the chat; taken up again when FILE exists. "
        "A prompt must begin as the saved one did; FILE is not extended",
    )

    add = parser.add_argument_group("answer").add_argument
    length = ("-n", "--max-tokens", "--n-predict", "--max-new-tokens")
    add(*length, type=_sampling("max_tokens", _length), metavar="N", help="at most N tokens (default, or -1: no limit)")
    add("--temp", "--temperature", type=_sampling("temperature", float), metavar="T", help="0: greedy (the default)")
    add("--top-k", type=_sampling("top_k", int), metavar="K", help="sample from the K likeliest tokens; 0: all")
    add("--top-p", type=_sampling("top_p", float), metavar="P", help="... from the fewest that reach probability P")
    add("--min-p", type=_sampling("min_p", float), metavar="P", help="... from those at least P times the likeliest")
    add("--repeat-penalty", type=_sampling("repeat_penalty", float), metavar="X", help="of the last 64 tokens; 1: none")
    add("-s", "--seed", type=_sampling("seed", int), metavar="N", help="of the random numbers (default: a new one)")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text (repeatable)")
    add("--ignore-eos", action="store_true", help="go on after the end")

    add = parser.add_argument_group("key-value cache").add_argument
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
    cache_flags(add)

    add = parser.add_argument_group("output").add_argument
    add("--no-display-prompt", action="store_true", help="do not repeat the text before its completion (--raw)")
    add("--json", action="store_true", help="one JSON object with text, counts and timings instead of the text")
    add("-v", "--verbose", action="store_true", help="more on stderr, and where an error came from")
    add("-q", "--quiet", action="store_true", help="nothing but errors on stderr")
    return parser


def model_flag(add, **settings):
    """-m of every program that loads a model, which is llama.cpp's -hf too. add: add_argument of a group."""
    what = f"a Hub repository (owner/name, owner/name:Q4_K_M), a folder or a .gguf file (default: {DEFAULT_MODEL})"
    add("-m", "--model", "-hf", "--hf-repo", **{"metavar": "MODEL", "help": what} | settings)


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


def cache_flags(add, several=lambda kind: kind):
    """The flags of a cache beside its method and how much that keeps. several: of a program that takes lists."""
    add(
        "--kv-dtype",
        type=several(kv_dtype),
        metavar="TYPE",
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


def _params(args):
    wanted = {
        "max_tokens": args.max_tokens,
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "seed": args.seed,
        "stop": args.stop,
    }
    for name in ("top_k", "top_p", "min_p"):
        if wanted[name] is not None and args.temp is None:
            raise UsageError(
                f"--{name.replace('_', '-')} means nothing to greedy decoding: add --temp, such as --temp 0.8"
            )
    given = {name: value for name, value in wanted.items() if value is not None}
    return SamplingParams(ignore_eos=args.ignore_eos, **given)


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


# Texts


def _texts(args):
    """(document or None, prompt or None)."""
    if args.text is not None and args.prompt_text is not None:
        raise UsageError("the prompt is given twice, by -p and as an argument: leave one out (or put quotes around it)")
    prompt = args.text if args.prompt_text is None else args.prompt_text
    if prompt == "-" and args.file == "-":
        raise UsageError("-p - and -f - would both read stdin: give one of them as a text or a file")
    if prompt is None and args.file is None and not _is_terminal(sys.stdin):
        prompt = "-"
    for flag, text in (("the prompt", prompt), ("-sys", args.system), *(("--stop", text) for text in args.stop or ())):
        _check_utf8(flag, text)
    document = None if args.file is None else read_text(args.file, "-f")
    if prompt is not None:
        prompt = read_text("-", "the prompt") if prompt == "-" else prompt
        if not prompt.strip() and document is None:
            raise UsageError("the prompt is empty: give a text with -p, a document with -f, or pipe one in")
    return document, prompt


def _is_terminal(stream):
    return stream is not None and stream.isatty()


def read_text(name, flag):
    """The text of a file, or of stdin ("-"), without the line ends that close it."""
    try:
        if name == "-":
            if sys.stdin is None:
                raise UsageError(f"{flag} is to come from stdin, and there is none: give a file or a text")
            data = sys.stdin.buffer.read()
        else:
            data = Path(name).expanduser().read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{flag} {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        where = "stdin" if name == "-" else name
        raise UsageError(f"{flag}: {where} is not UTF-8 text at byte {error.start}: convert it with iconv") from error
    text = text.replace("\r\n", "\n").rstrip("\n")
    if flag == "-f" and not text.strip():
        raise UsageError(f"-f {name} holds no text: give a document that does")
    return text


def _check_utf8(flag, text):
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UsageError(f"{flag} is not UTF-8 text: put it into a UTF-8 file and give that with -f") from None


def _check_prompt_cache(path):
    if path.is_dir():
        raise UsageError(f"--prompt-cache {path} is a folder: name a file in it")
    if path.exists() and not os.access(path, os.R_OK):
        raise UsageError(f"--prompt-cache {path} cannot be read: name another file, or change its permissions")
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"--prompt-cache {path}: {path.parent} is no folder that can be written: name a file elsewhere"
        )
