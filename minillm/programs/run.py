"""python -m minillm.run (or `minillm`): flags -> a model -> text or a chat, with timings at the end."""

import json
import os
import sys
import time
import traceback

import numpy as np

from minillm.compress.methods import methods_table
from minillm.errors import MinillmError, UsageError
from minillm.llm import LLM
from minillm.programs import cli, flags
from minillm.programs.chat import Chat
from minillm.programs.terminal import Interrupted, Terminal

INTERRUPTED = 130  # 128 + SIGINT, as shells and llama.cpp have it: a script can tell half an answer from a whole one


def main(argv=None):
    """Runs the command line; -> exit status."""
    return guarded(lambda argv: _run(cli.parse(argv)), argv)


def guarded(work, argv=None):
    """work(argv) -> exit status, of a program that people start: what it raises becomes one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the model looks at what comes out, and says it better
            return work(argv)
    except SystemExit:  # --help
        raise
    except BrokenPipeError:  # `| head` has had enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes what is buffered once more when it exits
            os.dup2(nowhere, stream.fileno())
        return 0
    except BaseException as error:
        if {"-v", "--verbose"} & set(argv):
            traceback.print_exception(error)
        message, status = _explain(error)
        print(f"minillm: {' '.join(message.split())}", file=sys.stderr)
        return status


def _explain(error):
    """(one line, exit status)"""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, MinillmError):
        return f"error: {error}", 2 if isinstance(error, UsageError) else 1
    if isinstance(error, MemoryError):
        return f"error: out of memory ({error}): try a smaller --kv-budget, a shorter prompt, or --dtype stored", 1
    if isinstance(error, OSError):  # the disk under stdout is full, for example
        return f"error: {error}", 1
    return f"error: a bug in minillm: {type(error).__name__}: {error}; -v shows where, please report it", 1


def _run(args):
    if args.kv_method == "list":
        print(methods_table())
        return 0
    terminal = Terminal(args.quiet)
    llm = LLM.load(
        args.model,
        cache=args.cache,
        context=args.ctx_size,
        chat_template=args.chat_template,
        profile=args.profile,
        progress=not args.quiet,
        **flags.machine(args),
    )
    terminal.header(llm)
    if args.cache.method is None and llm.profile is None:
        terminal.say(
            f"{llm.config.name} has no profile, so prompts are read twice: python -m minillm.profile makes one"
        )
    if args.verbose:
        terminal.say(repr(llm.cache_config))
    if (args.chat or args.system is not None) and not _has_template(llm):
        raise UsageError(
            f"{llm.config.name} has no chat template, and {'a chat' if args.chat else '-sys'} needs one: give "
            "--chat-template NAME or FILE, or complete a text with --raw -p TEXT"
        )
    if args.chat:
        Chat(llm, args, terminal).run()
        return 0
    return _complete(llm, args, terminal)


def _has_template(llm):
    return llm.tokenizer is not None and llm.tokenizer.has_chat_template


def _complete(llm, args, terminal):
    """One answer; -> exit status."""
    raw = args.raw or not _has_template(llm)
    head, rest = _prompt(llm, args, raw)
    echo = head + rest if raw and not (args.no_display_prompt or args.json) else ""
    session, tokens, seconds, status = llm.session(), 0, 0.0, 0
    session.new_turn = not raw
    try:
        with terminal.working() as reading:
            if args.prompt_cache is None:
                session.feed(head + rest)
            else:
                document = [] if raw or args.document is None else _messages(args, args.document.rstrip())
                tokens, seconds = _feed_cached(session, head, rest, document, args.prompt_cache, terminal, reading)
            pieces = session.stream(args.params, reading)
            terminal.write(pieces, reading.interrupts, echo, silent=args.json)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        status = INTERRUPTED
        if not session.timings.generated_tokens:
            terminal.say("interrupted while the prompt was read")
            return status
    summary = session.stats
    summary["stop_reason"] = summary["stop_reason"] or "interrupted"
    # What was read before the answer, for the prompt cache, was read for this prompt all the same.
    summary["prompt_tokens"] += tokens
    summary["cached_tokens"] -= tokens
    summary["prompt_seconds"] += seconds
    summary["first_token_seconds"] += seconds
    if args.json:
        print(json.dumps(summary))
    terminal.timings(summary)
    return status


def _prompt(llm, args, raw):
    """The text that the model reads, in two parts: up to the end of the document (without one: all of it), and the
    rest."""
    text = "\n\n".join(part for part in (args.document, args.prompt) if part)
    rendered = text
    if not raw:
        rendered = llm.tokenizer.render_chat(_messages(args, text))
    at = rendered.rfind(text.strip())  # templates trim what they are given
    end = len(rendered) if args.document is None or at < 0 else at + len(args.document.strip())
    return rendered[:end], rendered[end:]


def _messages(args, text):
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": text}]


def _feed_cached(session, head, rest, messages, path, terminal, progress):
    """Feed a prompt whose first part, the document, is taken from the session file `path`, or read, settled and saved
    there where that does not exist yet. -> (tokens read, seconds). messages: of the chat up to the document, if any.

    The two parts are encoded apart, and the last token of the first is left unread in the file: so tokens and
    compression are the same whether the file was there or not, and something is left to read if nothing follows."""
    first = session.llm.encode(head)
    ids = first + (session.llm.encode(rest, bos=False) if rest else [])
    if path.exists():
        session.restore(path)
        saved = session.cache.token_ids + session.unread
        same = next((i for i, (a, b) in enumerate(zip(saved, ids, strict=False)) if a != b), min(len(saved), len(ids)))
        if same < len(saved):
            raise MinillmError(
                f"{path} holds another prompt: of its {len(saved)} tokens the first {same} are those of this one; name "
                "another file, or delete it"
            )
        terminal.say(f"{path}: {len(saved)} tokens are taken up")
        session.feed(ids[len(saved) :])
        return 0, 0.0
    start = time.perf_counter()
    n_read = len(first) - 1
    session.feed(first[:-1])
    session.settle(progress)
    session.feed(first[-1:])
    session.messages, session.rendered = messages, head if messages else None
    session.save(path)
    session.feed(ids[len(first) :])
    return n_read, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
