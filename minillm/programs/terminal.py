"""Manners at a terminal: what is said on stderr, text on stdout as it comes, and what Ctrl-C does."""

import contextlib
import signal
import sys
import time

from minillm.compress.plan import SHORT
from minillm.files.stored_model import n_parameters
from minillm.memory import resident_memory

PATIENCE = 2.0  # seconds after which a second Ctrl-C does not wait any more
BAR_DELAY = 1.0  # seconds that reading a prompt may take without a progress bar


class Interrupted(KeyboardInterrupt):
    """A second Ctrl-C came while the first waited for a token or layer to end: nothing may be thought whole."""


class Interrupts:
    """Ctrl-C while a model works is noted, and acted upon in `check`: between two tokens or layers, where the session
    is whole."""

    def __enter__(self):
        self.pressed = None
        # Ignored (nohup) or taken by the program around us: left alone.
        self.mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.mine:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception):
        if self.mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number, frame):
        now = time.monotonic()
        if self.pressed is not None and now - self.pressed > PATIENCE:
            raise Interrupted
        self.pressed = self.pressed or now

    def check(self):
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.pressed is not None:
            self.pressed = None
            raise KeyboardInterrupt


class Reading:
    """The progress callback of a prompt: checks for Ctrl-C, and shows a bar on a terminal if it takes long."""

    def __init__(self, interrupts, shown):
        self.interrupts, self.shown, self.bar = interrupts, shown, None

    def __call__(self, done, layers):
        if self.shown and self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=layers, desc="reading", unit="layer", leave=False, delay=BAR_DELAY)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        if done == layers:
            self.close()
        self.interrupts.check()

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Terminal:
    """stderr and stdout of one run. quiet: nothing on stderr but errors."""

    def __init__(self, quiet=False):
        self.quiet = quiet
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop

    def say(self, line=""):
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def error(self, message):
        print(f"minillm: error: {message}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def working(self):
        """Around a model's work: Ctrl-C waits for the end of a token or layer. -> a progress callback."""
        with Interrupts() as interrupts:
            reading = Reading(interrupts, shown=not self.quiet and sys.stderr.isatty())
            try:
                yield reading
            finally:
                reading.close()

    def write(self, pieces, interrupts, text="", silent=False):
        """`text`, and after it an answer as it comes, to stdout; at last the end of the line. Ctrl-C raises
        KeyboardInterrupt and leaves the answer where it is. silent: show nothing of it."""

        def show(text):
            if not silent:
                sys.stdout.write(text)
                sys.stdout.flush()

        show(text)
        done = False
        with contextlib.closing(pieces):
            try:
                for piece in pieces:
                    show(piece.text)
                    text = piece.text or text
                    interrupts.check()
                done = True
            finally:
                if not text.endswith("\n") and (text or done):
                    show("\n")

    def header(self, llm):
        c = llm.config
        now = resident_memory()
        self.say(
            f"{c.name}: {count(n_parameters(c))} parameters, {llm.dtype}, {c.n_layers} layers x "
            f"{c.n_heads}/{c.n_kv_heads} heads x {c.head_dim}, context {llm.context}, {llm.model.ops.DEVICE}; "
            f"memory {'' if now is None else size(now) + ' now, '}"
            f"cache {size(llm.cache_bytes(llm.context))} at full context"
        )

    def timings(self, summary):
        """The block at the end, from Session.stats."""
        s, cache = summary, summary["cache"]
        kept = _kept(cache, s["prompt_tokens"] + s["cached_tokens"])
        self.say(
            f"\nprompt      {_rate(s['prompt_tokens'], s['prompt_seconds'])} (cached {s['cached_tokens']})\n"
            f"generated   {_rate(s['generated_tokens'], s['generation_seconds'])}\n"
            f"cache       {cache['method']}, {kept}; {cache['entries']} entries,"
            f" {size(cache['bytes'])} (full: {size(cache['full_bytes'])})\n"
            f"memory      peak {size(s['peak_bytes'])}"
        )


def _asked(budget):
    return f"asked {budget}" if isinstance(budget, float) else f"asked {budget} entries a head"


def _kept(cache, n_tokens):
    if cache["method"] == "full":
        return "everything kept"
    asked = [] if cache["budget"] is None else [_asked(cache["budget"])]
    asked += [] if cache["quality"] is None else [f"quality {cache['quality']:g}"]
    asked += [] if cache["tau"] is None else [f"tau {cache['tau']:.2f}"]
    asked += [] if cache["threshold"] is None else [f"threshold {cache['threshold']:.3g}"]
    short = f"; up to {SHORT} tokens are left whole" if n_tokens <= SHORT else ""
    return f"kept {cache['kept']:.3f} of the prompt ({', '.join(asked)}{short})"


def _rate(tokens, seconds):
    rate = f"{tokens / seconds:8.2f} tok/s" if tokens and seconds else "       - tok/s"
    return f"{tokens:6d} tokens  {seconds:8.2f} s  {rate}"


def count(n):
    """A number for people."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return str(n)


def size(n):
    """Bytes for people."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n / (1 << 10):.0f} KiB"
