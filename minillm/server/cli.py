"""The command line of the server: flags, each also as a variable of the environment."""

import argparse
import os
from pathlib import Path

from minillm import ops
from minillm.errors import UsageError
from minillm.programs import flags
from minillm.server.settings import MIB, Settings
from minillm.text.chat_template import ChatTemplate, find_template

DESCRIPTION = """\
Serve a model over the API that OpenAI's clients speak: chat and text completions.

Every flag may also be given as a variable of the environment: --ctx-size as MINILLM_ARG_CTX_SIZE."""

PREFIX = "MINILLM_ARG_"
SWITCHED = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


def parse(argv, environ=os.environ):
    """Arguments -> a namespace with every flag, and made of them: cache (CacheConfig) and settings (Settings). What
    the command line says goes before what the environment says. Raises UsageError; `--help` leaves."""
    parser = _parser()
    args = parser.parse_args([*_from_environment(parser, environ), *argv])
    if args.kv_method == "list":
        return args
    args.cache = flags.cache_config(args)
    ops.backend(args.device)
    if args.chat_template is not None:
        ChatTemplate(find_template(args.chat_template))
    args.settings = Settings(
        params=flags.sampling_params(args),
        aliases=_listed(args.alias),
        api_keys=(*_listed(args.api_key), *_keys_of(args.api_key_file)),
        cors_origins=_listed(args.cors_origins),
        parallel=args.parallel,
        max_queue=args.max_queue,
        timeout=args.timeout,
        drain_timeout=args.drain_timeout,
        cache_ram=None if args.cache_ram is None else args.cache_ram * MIB,
        cache_disk=args.cache_disk,
        cache_disk_limit=args.cache_disk_limit * MIB,
        max_body=args.max_body * MIB,
        ping_interval=args.sse_ping_interval,
        slots=args.slots,
        metrics=args.metrics,
        webui=args.webui,
    )
    return args


def _parser():
    parser = flags.Parser(prog="minillm-server", description=DESCRIPTION)
    add = parser.add_argument_group("model").add_argument
    flags.model_flag(add)
    flags.context_flag(add)
    flags.template_flag(add)
    flags.machine_flags(add)

    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=_port, default=8080, help="0: any that is free (default 8080)")
    add("-a", "--alias", default="", metavar="NAME,..", help="the model's id in answers, and its other names")
    add("--api-key", default="", metavar="KEY,..", help="one of which a request must have (default: none is needed)")
    add("--api-key-file", metavar="FILE", help="... one a line")
    add("--cors-origins", default="", metavar="URL,..", help="whose web pages may ask; * is all (default: none)")
    add("--max-body", type=flags.positive, default=32, metavar="MIB", help="of a request (default 32)")
    add("--slots", action=argparse.BooleanOptionalAction, default=True, help="/slots shows the sequences (default: on)")
    add("--metrics", action=argparse.BooleanOptionalAction, default=True, help="/metrics for Prometheus (default: on)")
    add("--webui", action=argparse.BooleanOptionalAction, default=True, help="/ is a page to chat on (default: on)")

    add = parser.add_argument_group("many users").add_argument
    add("-np", "--parallel", type=flags.positive, default=16, metavar="N", help="answers at a time (default 16)")
    add("--max-queue", type=flags.at_least(0), default=64, metavar="N", help="requests that may wait (default 64)")
    add("-to", "--timeout", type=_seconds, default=600.0, metavar="S", help="a request may take so long (default 600)")
    add("--drain-timeout", type=_seconds, default=30.0, metavar="S", help="answers may go on at the end (default 30)")
    add(
        "--sse-ping-interval",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="of a waiting stream's comments (10)",
    )

    add = parser.add_argument_group("answers that do not say otherwise").add_argument
    flags.sampling_flags(add, "default 0.8; 0: greedy")
    parser.set_defaults(temp=0.8)

    add = parser.add_argument_group("key-value cache").add_argument
    flags.method_flags(add)
    flags.cache_flags(add)
    add(
        "--cache-limit",
        type=flags.positive,
        metavar="MIB",
        help="for all caches (default: 60 %% of what is free)",
    )
    add("--cache-ram", type=flags.at_least(0), metavar="MIB", help="of that for prefixes read before (default: half)")
    add("--cache-disk", metavar="DIR", help="a folder for prefixes that have no room there, also after a restart")
    add("--cache-disk-limit", type=flags.positive, default=8192, metavar="MIB", help="of its files (default 8192)")

    add = parser.add_argument_group("output").add_argument
    add("-v", "--verbose", action="store_true", help="where an error came from")
    add("-q", "--quiet", action="store_true", help="nothing but errors on stderr")
    return parser


def _from_environment(parser, environ):
    """Arguments that the variables MINILLM_ARG_* are. Raises UsageError for one that names no flag."""
    actions = {}
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and action.dest != "help":
                actions[PREFIX + option.removeprefix("--").replace("-", "_").upper()] = option, action
    found = []
    for name, value in environ.items():
        if not name.startswith(PREFIX):
            continue
        if name not in actions:
            raise UsageError(f"{name} is set and there is no such flag: see --help, and unset it")
        option, action = actions[name]
        if action.nargs != 0:
            found.append(f"{option}={value}")
        elif value.lower() not in SWITCHED:
            raise UsageError(f"{name} is {value!r}: write 1 or 0")
        elif SWITCHED[value.lower()]:
            found.append(option)
        elif (off := option.replace("--", "--no-", 1)) in action.option_strings:
            found.append(off)
    return found


def _listed(text):
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _keys_of(path):
    """The lines of a file of keys. Raises UsageError where it has none: the server would be open to everybody."""
    if path is None:
        return ()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read ({error}): name a text file") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key: write one a line")
    return keys


def _port(text):
    if not 0 <= (port := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"must be in 0..65535, not {port}")
    return port


def _seconds(text):
    if not 0 < (seconds := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return seconds
