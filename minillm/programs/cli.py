"""The command line of minillm: flags and texts, checked before a model is loaded."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from minillm import ops
from minillm.constraint import Constraint
from minillm.errors import UsageError
from minillm.programs import flags
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


def parse(argv):
    """Arguments -> a namespace with every flag, and made of them: params (SamplingParams), cache (CacheConfig),
    document and prompt (texts or None), chat (bool: an interactive chat). Raises UsageError; `--help` leaves."""
    args = _parser().parse_args(argv)
    if args.kv_method == "list":
        return args
    args.cache = flags.cache_config(args)
    params = flags.sampling_params(args)
    ends = {"stop": args.stop or (), "ignore_eos": args.ignore_eos}
    args.params = replace(params, **ends, constraint=_constraint(args))
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
    parser = flags.Parser(prog="minillm", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the prompt, as with -p")
    add = parser.add_argument_group("model").add_argument
    flags.model_flag(add)
    flags.context_flag(add)
    flags.machine_flags(add)

    add = parser.add_argument_group("prompt").add_argument
    add("-p", "--prompt", metavar="TEXT", dest="prompt_text", help="the prompt; - reads stdin")
    add("-f", "--file", metavar="FILE", help="a document (UTF-8; - is stdin) that goes before the prompt")
    add("-sys", "--system-prompt", metavar="TEXT", dest="system", help="default: the chat template's own")
    add("--raw", "-no-cnv", action="store_true", help="complete the text as it stands, without the chat template")
    flags.template_flag(add)
    add(
        "--prompt-cache",
        type=Path,
        metavar="FILE",
        help="keep what was read: the document of -f, else the prompt, or the chat; taken up again when FILE exists. "
        "A prompt must begin as the saved one did; FILE is not extended",
    )

    add = parser.add_argument_group("answer").add_argument
    flags.sampling_flags(add)
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text (repeatable)")
    add("--ignore-eos", action="store_true", help="go on after the end")
    add(
        "-j",
        "--json-schema",
        metavar="SCHEMA",
        help="answer in JSON by this schema: a file, or its text ({}: any JSON)",
    )
    add("--grammar", metavar="GBNF", help="answer by this grammar, as llama.cpp writes them: a file, or its text")

    add = parser.add_argument_group("key-value cache").add_argument
    flags.method_flags(add)
    flags.cache_flags(add)

    add = parser.add_argument_group("output").add_argument
    add("--no-display-prompt", action="store_true", help="do not repeat the text before its completion (--raw)")
    add("--json", action="store_true", help="one JSON object with text, counts and timings instead of the text")
    add("-v", "--verbose", action="store_true", help="more on stderr, and where an error came from")
    add("-q", "--quiet", action="store_true", help="nothing but errors on stderr")
    return parser


def _constraint(args):
    """The Constraint of an answer, or None."""
    schema, grammar = args.json_schema, args.grammar
    if schema is not None and grammar is not None:
        raise UsageError("--json-schema and --grammar each say what the answer must be: leave one of them out")
    if schema is not None:
        is_text = schema.lstrip().startswith("{")
        return Constraint.json_schema(schema if is_text else read_text(schema, "--json-schema"))
    if grammar is not None:
        return Constraint.gbnf(grammar if "::=" in grammar else read_text(grammar, "--grammar"))
    return None


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
