"""Request: tokens to be read and, after them, an answer in the making, with all that is its own: compressor, cache,
sampling, outcome."""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from minillm.compress.reading import read, recompress
from minillm.engine.admission import promise
from minillm.logprobs import Logprob
from minillm.sampling import PENALTY_WINDOW, Drawn, Sampler, drawn

OVER = ("done", "cancelled", "failed")


@dataclass(frozen=True)
class Piece:
    """One generated token, and the text that became safe to show with it (a character or a stop text may be held
    back)."""

    token_id: int  # -1: none, the piece is the rest of the text
    text: str
    logprob: Logprob | None = None  # of the token, or of the one that ended the answer; where SamplingParams ask for it


@dataclass
class Timings:
    """Counts and seconds of one answer."""

    prompt_tokens: int = 0  # read for this answer
    cached_tokens: int = 0  # already in the cache before it
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    first_token_seconds: float = 0.0
    kept: float = 1.0  # entries stored / entries of a full cache, at the end of the prompt


class Request:
    """Reads tokens of one sequence into its cache and, with `params`, generates what follows.

    state: waiting (for memory) -> reading -> generating -> done, cancelled or failed. A failed request has its own
    exception in `error`. pieces: what was generated and not taken yet."""

    def __init__(
        self, model, compressor, cache, unread, params=None, *, context=None, stop_ids=frozenset(), matcher=None
    ):
        """compressor: None stores everything. unread: token ids; those that are read leave this list, and the one
        generated last is in it. params: SamplingParams; None: only read. context: positions there are; None: enough.
        matcher: constraint.Matcher of this answer, where params have a constraint."""
        self.model, self.compressor, self.cache, self.unread = model, compressor, cache, unread
        self.params, self.context, self.stop_ids = params, context, stop_ids
        self.sampler = params and Sampler(params, matcher)
        self.decoder = None  # StreamDecoder, where there is text
        self.answers = ()  # SamplingParams of answers that follow in forks: one is promised for with what is read
        self.settles = ()  # numbers of tokens: when so many have been read, they settle, see KVCache.settle
        self.settled = None  # called with the cache each time that is so, by whoever owns the model
        self.look = None  # called with this, before memory is promised and before it begins to read: see take_up
        self.min_tokens = 0  # that are generated before a stop id may be
        self.resumes = False  # `unread` is a token that was generated: it is decoded, not read
        self.hidden = None  # (n, dim) states of what was read: given where that was done before, or the outcome
        self.pull = False  # whether a piece is made only once it is asked for: the state is that of the pieces taken
        self.asked = False
        self.check_memory = None  # called on admission; raises MinillmError where the device has not enough
        self.wake = None  # called when there is something new, where nobody waits in a thread

        self.state, self.error, self.pieces = "waiting", None, deque()
        self.token_ids, self.logprobs, self.text = [], [], ""  # logprobs: also of the token that ended it
        self.stop_reason = None  # "eos", "stop" or "length"
        self.share = 0.0  # of the reading
        self.timings = Timings(prompt_tokens=len(unread), cached_tokens=cache.seen)
        self._reading = self._draw = None
        self.admitted = None  # time.perf_counter() then
        self._start = time.perf_counter()
        self._begin = None  # of generating

    @property
    def over(self):
        return self.state in OVER

    @property
    def ready(self):
        """Whether a piece or the end can be taken."""
        return bool(self.pieces) or self.over

    @property
    def wanted(self):
        """Whether it is to go on now."""
        return not self.over and (not self.pull or (self.asked and not self.pieces))

    def pop(self):
        """The next Piece, or None at the end. Raises what it failed with."""
        self.asked = False
        if self.pieces:
            return self.pieces.popleft()
        if self.error is not None:
            raise self.error
        return None

    # what the scheduler does with it, in the thread that owns the model

    def take_up(self, cache):
        """Have a beginning of what is unread from a cache that holds that, settled, and not read it."""
        taken = cache.seen - self.cache.seen
        del self.unread[:taken]
        self.cache.take_up(cache)
        self.timings.prompt_tokens -= taken
        self.timings.cached_tokens += taken

    @property
    def parts(self):
        """Tokens of each part of what is unread: parts end where what was read settles."""
        start, end = self.cache.seen, self.cache.seen + len(self.unread)
        ends = [*(at for at in self.settles if start < at < end), end]
        return [hi - lo for lo, hi in zip([start, *ends], ends, strict=False)]

    def admit(self):
        """It may begin: its memory is promised."""
        if self.check_memory:
            self.check_memory()
        self.admitted = time.perf_counter()
        self.state = "generating" if self.resumes else "reading"

    def read_on(self):
        """Read on through one block of the model; at the end draw the first token."""
        if self.hidden is None:
            if self._reading is None:
                if self.look and not self.share:
                    self.look(self)
                    self.cache.pool.reserve(self.cache, promise(self))
                self._begin_part()
            try:
                self.share = self._before + self._part * next(self._reading).share
                return
            except StopIteration as end:
                hidden, self._reading = end.value, None
            del self.unread[: self._n]
            if self.unread:
                self._settle()
                return
            self.hidden, self.share = hidden, 1.0
        self.timings.kept = self.cache.kept
        if self.params is None:
            self.timings.prompt_seconds = time.perf_counter() - self.admitted
            self.finish()
            return
        last, self.hidden = self.hidden[-1:], None
        self.state = "generating"
        self.take(self._drawn(self.model.logits(last)[0] if self.on_host else self.model.draw(last, [self.draw()])[0]))

    def _begin_part(self):
        self._n = self.parts[0]
        self._reading = read(self.model, self.unread[: self._n], [self.cache], [self.compressor])
        self._before, self._part = self.share, (1 - self.share) * self._n / max(len(self.unread), 1)

    def _settle(self):
        """A part was read, and others follow. It needs no promise any more."""
        self.cache.settle()
        self.cache.pool.reserve(self.cache, promise(self))
        if self.settled:
            self.settled(self.cache)

    @property
    def _early(self):
        return len(self.token_ids) < self.min_tokens

    @property
    def on_host(self):
        """Whether its next token is drawn here from the logits; else the model draws it by `draw`."""
        return self.params.on_host or self._early

    def draw(self):
        """The Draw of the token after those read and unread. The same until that token is taken."""
        if self._draw is None:
            recent = [*self.cache.token_ids[-PENALTY_WINDOW:], *self.unread]
            self._draw = self.sampler.draw(recent, never=self.stop_ids if self._early else ())
        return self._draw

    def _drawn(self, found):
        """The Drawn of what the model found: the token that comes next, or the logits (vocab,) of it."""
        return drawn(found, self.draw()) if isinstance(found, np.ndarray) else Drawn(found)

    def decoded(self, found):
        """`unread` was decoded; found: the token that comes next, or the logits (vocab,) of it."""
        self.unread.clear()
        following = self._drawn(found)
        try:
            if self.compressor and self.compressor.due(self.cache):
                recompress(self.model, self.cache, self.compressor)
        except BaseException:
            self.unread.append(following.token_id)  # whoever goes on with this sequence loses nothing
            raise
        self.take(following)

    def take(self, following):
        """The next token, as it was Drawn."""
        now, timings, token = time.perf_counter(), self.timings, following.token_id
        self._draw = None
        if self._begin is None:
            self._begin, timings.prompt_seconds = now, now - self.admitted
        if token in self.stop_ids:
            self.stop_reason = "eos"
            rest = self._rest()
            if following.logprob:
                self.logprobs.append(following.logprob)
            if rest or following.logprob:
                self.pieces.append(Piece(-1, rest, following.logprob))
            self.finish()
            return
        self.unread.append(token)
        self.token_ids.append(token)
        self.sampler.take(token)
        if following.logprob:
            self.logprobs.append(following.logprob)
        timings.generated_tokens += 1
        timings.first_token_seconds = timings.first_token_seconds or now - self._start
        text = self.decoder.push(token) if self.decoder else ""
        self.text += text
        if self.decoder and self.decoder.stopped:
            self.stop_reason = "stop"
        elif len(self.token_ids) == self.params.max_tokens or self._full():
            self.stop_reason = "length"
        self.pieces.append(Piece(token, text + self._rest() if self.stop_reason else text, following.logprob))
        timings.generation_seconds = time.perf_counter() - self._begin
        if self.stop_reason:
            self.finish()

    def _full(self):
        return self.context is not None and self.cache.position + len(self.unread) >= self.context

    def _rest(self):
        """The text still held back at the end."""
        rest = self.decoder.finish() if self.decoder and self.stop_reason != "stop" else ""
        self.text += rest
        return rest

    def finish(self, state="done", error=None):
        """It is over. What a reading that is left had added is gone."""
        if self._reading is not None:
            self._reading.close()
        self._reading, self.state, self.error = None, state, error
        if self._begin is not None:
            self.timings.generation_seconds = time.perf_counter() - self._begin
