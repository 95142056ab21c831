"""The interactive chat: a line is a turn, and a turn reads only its own new tokens."""

import re
import sys

from minillm.errors import MinillmError
from minillm.programs.terminal import Interrupted, Terminal

HELP = """\
/reset   forget the conversation
/stats   tokens, seconds and memory of the last answer
/exit    leave (also Ctrl-D)
Ctrl-C   ends an answer; pressed twice at the prompt, it leaves"""


class Chat:
    """A conversation of one person with one model."""

    def __init__(self, llm, args, terminal):
        self.llm, self.args, self.terminal = llm, args, terminal
        self.session = llm.session()

    def run(self):
        """Turns until /exit, Ctrl-D or two Ctrl-C. With a prompt cache: taken up at the start and saved at the end."""
        terminal, path = self.terminal, self.args.prompt_cache
        if path and path.exists():
            self._restore(path)
        terminal.say("/help lists the commands, Ctrl-D leaves")
        pressed = False  # Ctrl-C, at the prompt before this one
        while True:
            try:
                line = _read_line().strip()
                pressed = False
                if line == "/exit":
                    break
                if re.fullmatch("/[a-z]*", line):  # and not /usr/bin
                    self._command(line)
                elif line:
                    self._answer(line)
            except EOFError:
                break
            except Interrupted:
                raise
            except KeyboardInterrupt:
                if pressed:
                    break
                pressed = True
                terminal.say("\nCtrl-C again, Ctrl-D or /exit leaves")
        terminal.say()
        if path and self.session.messages:
            self.session.save(path)
            terminal.say(f"{path}: the chat is saved ({self.session.seen_soon} tokens)")

    def _restore(self, path):
        session, system = self.session, self.args.system
        session.restore(path)
        if not session.messages:
            raise MinillmError(f"{path} holds a prompt, not a chat: name another file, or give the prompt")
        first = session.messages[0]
        if system is not None and first != {"role": "system", "content": system}:
            raise MinillmError(f"{path} holds a chat with another system prompt: leave -sys out, or name another file")
        turns = sum(message["role"] == "user" for message in session.messages)
        turns = f"{turns} turn{'s' * (turns != 1)}"
        self.terminal.say(f"{path}: a chat of {turns}, {session.seen_soon} tokens, is taken up")

    def _command(self, line):
        session, terminal = self.session, Terminal()  # not a quiet one: what is asked for is shown
        if line == "/reset":
            session.close()
            self.session = self.llm.session()
            saved = self.args.prompt_cache
            saved = f"; {saved} holds it still, until a new one is saved" if saved and saved.exists() else ""
            terminal.say(f"the conversation is forgotten{saved}")
        elif line == "/stats":
            if session.answer:
                terminal.timings(session.stats)
            else:
                terminal.say(
                    f"no answer yet; {session.cache.seen} tokens read, {session.cache.entries} entries in the cache"
                )
        elif line == "/help":
            terminal.say(HELP)
        else:
            terminal.say(f"{line} is no command; /help lists them")

    def _answer(self, line):
        args, terminal, session = self.args, self.terminal, self.session
        try:
            with terminal.working() as reading:
                terminal.write(session.ask(line, args.params, args.system, reading), reading.interrupts)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            terminal.say("(stopped)")
        except MinillmError as error:
            terminal.error(f"{error}; /reset forgets the conversation")
            return
        if session.seen_soon >= self.llm.context:
            terminal.say(f"the context of {self.llm.context} tokens is full: /reset forgets the conversation")


def _read_line():
    """A line from the terminal, with editing and history where Python has readline."""
    if sys.stdout.isatty():
        try:
            import readline  # noqa: F401  input() uses it once it is imported
        except ImportError:
            pass
        line = input("> ")
    else:  # stdout is for answers alone
        print("> ", end="", file=sys.stderr, flush=True)
        line = input()
    return line.encode(errors="surrogateescape").decode(errors="replace")
