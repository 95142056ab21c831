"""python -m minillm.server (or `minillm-server`): flags -> a model -> an address that answers until a signal comes."""

import ipaddress
import socket

from minillm.compress.methods import methods_table
from minillm.errors import MinillmError
from minillm.llm import LLM
from minillm.programs import flags
from minillm.programs.run import guarded
from minillm.programs.terminal import Terminal, size
from minillm.server import cli
from minillm.server.settings import MIB

DOCUMENT = 6000  # tokens of the documents that the start line counts
SHARE = 0.6  # of the memory that is free once the model is loaded: what caches may take where nobody says


def main(argv=None):
    """Runs the command line; -> exit status."""
    return guarded(lambda argv: _serve(cli.parse(argv)), argv)


def _serve(args):
    if args.kv_method == "list":
        print(methods_table())
        return 0
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise MinillmError('the server needs more packages: pip install "minillm-engine[server]"') from None
    from minillm.server.app import Server
    from minillm.server.listener import Listener

    terminal = Terminal(args.quiet)
    listening = bound(args.host, args.port)  # before the model is loaded: a port that is taken is said at once
    with listening, load(args) as llm:
        terminal.header(llm)
        listener = Listener(Server(llm, args.settings))
        host, port = listening.getsockname()[:2]
        terminal.say(start_line(llm, host, port))
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback and not args.settings.api_keys:
            terminal.say("warning: whoever reaches this address may ask: give --api-key KEY")
        listener.run(sockets=[listening])
    return 0


def load(args):
    """The LLM that the flags name, and its limit of memory for caches."""
    llm = LLM.load(
        args.model,
        cache=args.cache,
        context=args.ctx_size,
        chat_template=args.chat_template,
        profile=args.profile,
        progress=not args.quiet,
        **flags.machine(args),
    )
    free = llm.model.ops.available_memory()
    if args.cache_limit is not None:
        llm.cache_limit = args.cache_limit * MIB
    elif free is not None:
        llm.cache_limit = int(SHARE * free)
    return llm


def bound(host, port):
    """A socket that is bound to an address, and does not listen yet. Raises MinillmError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise MinillmError(
            f"{host} port {port} cannot be had ({error.strerror}): give another --host or --port"
        ) from None
    return listening


def start_line(llm, host, port):
    """Address, model, and what the memory for caches is enough for."""
    line = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 serves {llm.config.name}"
    if llm.cache_limit is None:
        return line
    tokens = min(DOCUMENT, llm.context)
    documents = llm.cache_limit // llm.cache_bytes(tokens)
    return f"{line}; {size(llm.cache_limit)} for caches: {documents} documents of {tokens:,} tokens"
