"""One conversation with a model: what it has read, what it has yet to read, and its compressed cache.

A later turn reads only its own new tokens. A session can be saved to a file and taken up again.
"""

import json
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.cache import state as cache_state
from minillm.compress.reading import extend, recompress
from minillm.errors import MinillmError
from minillm.files import own_file
from minillm.memory import peak_memory
from minillm.preflight import require, workspace_bytes
from minillm.sampling import PENALTY_WINDOW, Sampler
from minillm.text.stream import StreamDecoder

SESSION_FORMAT = 4
REPLY = "\u0001reply\u0001"  # stands for the last answer when a template is asked what comes after it


@dataclass(frozen=True)
class Piece:
    """One generated token, and the text that became safe to show with it (a character or a stop text may be held
    back)."""

    token_id: int
    text: str


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


class Answer:
    """One answer in the making: says how tokens are drawn, and takes them until a stop id, a stop text or a limit ends
    it."""

    def __init__(self, session, params):
        self.params, self.session = params, weakref.proxy(session)  # no cycle: a session dropped is memory given back
        self.sampler, self.decoder = Sampler(params), None
        llm = session.llm
        if llm.tokenizer:
            self.decoder = StreamDecoder(llm.tokenizer, params.stop, continues=not session.new_turn)
        elif params.stop:
            raise MinillmError("stop texts need a tokenizer, and this model folder has none: add its tokenizer.json")
        self.stop_ids = frozenset() if params.ignore_eos else llm.stop_ids
        self.token_ids, self.text, self.stop_reason = [], "", None  # None, "eos", "stop" or "length"

    def draw(self):
        """The Draw of the token after those that were fed, generated or read."""
        session = self.session
        recent = [*session.cache.token_ids[-PENALTY_WINDOW:], *session.unread]
        return self.sampler.draw(recent)

    def take(self, token):
        """The next token -> its Piece, or None where the answer ended before it."""
        session = self.session
        if token in self.stop_ids:
            self.stop_reason = "eos"
            return None
        session.unread.append(token)
        self.token_ids.append(token)
        text = self.decoder.push(token) if self.decoder else ""
        self.text += text
        if self.decoder and self.decoder.stopped:
            self.stop_reason = "stop"
        elif len(self.token_ids) == self.params.max_tokens or session.position_soon >= session.llm.context:
            self.stop_reason = "length"
        return Piece(token, text)

    def rest(self):
        """The text still held back at the end."""
        text = self.decoder.finish() if self.decoder and self.stop_reason != "stop" else ""
        self.text += text
        return text


def is_chat(prompt):
    """Whether a prompt is chat messages: a list of dicts."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt)


def step(sessions, draws=None):
    """Read the one token that each of B sessions of one LLM generated last; -> logits (B, vocab), or by B Draws the
    token that comes next in each. Closed chunks are compressed where enough has come together."""
    llm, unread = sessions[0].llm, [session.unread[0] for session in sessions]
    result = llm.model.decode(unread, [session.cache for session in sessions], draws)
    for session in sessions:
        session.unread = []
    for i, session in enumerate(sessions):
        if llm.compressor.due(session.cache):
            try:
                recompress(llm.model, session.cache, llm.compressor)
            except BaseException:
                session.unread = [int(result[i])] if draws else []  # what was drawn is not lost
                raise
    return result


class Session:
    """A sequence of an LLM. `feed` adds a prompt, `stream` reads it and answers; `ask` is a turn of a chat."""

    def __init__(self, llm):
        self.llm = llm
        window = llm.config.sliding_window if llm.cache_config.method == "full" else None
        self.cache = llm.new_cache(window)
        self.unread = []  # token ids that were fed or generated and not read yet
        self.messages = []  # the chat so far
        self.rendered = None  # the chat template's text up to the last answer
        self.new_turn = False  # whether an answer begins a turn, and does not go on where a text ended
        self.timings = Timings()
        self.answer = None  # the last Answer
        self.stats = {}  # summary of the last answer

    @property
    def seen_soon(self):
        return self.cache.seen + len(self.unread)

    @property
    def position_soon(self):
        """Of the next token, which is what the context limits."""
        return self.cache.position + len(self.unread)

    def feed(self, prompt):
        """Add a prompt: text (special tokens in it are recognised), token ids, or chat messages (list of dicts)."""
        self.unread += self.llm.encode(prompt, bos=self.seen_soon == 0)
        self.new_turn = self.new_turn or is_chat(prompt)

    def read(self, progress=None):
        """Read what was fed; -> logits (vocab,) after its last token. progress(layers done, layers)."""
        return self.llm.model.logits(self._extend(progress))[0]

    def read_and_draw(self, draw, progress=None):
        """Read what was fed; -> the token that comes next, by a Draw."""
        return self.llm.model.draw(self._extend(progress), [draw])[0]

    def _extend(self, progress):
        """Read what was fed; -> the hidden state (1, dim) of its last token."""
        self.check_room()
        hidden = extend(self.llm.model, self.unread, self.cache, self.llm.compressor, progress)
        self.unread = []
        return hidden[-1:]

    def check_room(self, result=0):
        """Raise MinillmError if what was fed is nothing, or does not fit into the context or, with `result` more bytes,
        into the memory there is."""
        llm, n = self.llm, self.seen_soon
        if not self.unread:
            raise MinillmError("the prompt is empty: give some text")
        if self.position_soon > llm.context:
            raise MinillmError(
                f"the prompt has {n} tokens and the context {llm.context}: shorten it, raise "
                f"-c/--ctx-size (the model's own limit is {llm.config.context}), or take a model with a longer context"
            )
        more = max(0, llm.cache_bytes(n) - self.cache.bytes_in_use)
        workspace = workspace_bytes(llm.config, len(self.unread)) + result
        require(llm.model.ops, "the prompt", n, cache=more, workspace=workspace)

    def stream(self, params, progress=None):
        """Read what was fed and answer: yields Pieces; `self.answer` and `self.timings` tell how it went. The state
        is whole at every yield, so that an answer may be left at any time."""
        start = time.perf_counter()
        self.answer = answer = Answer(self, params)
        self.timings = timings = Timings(prompt_tokens=len(self.unread), cached_tokens=self.cache.seen)
        token = self.read_and_draw(answer.draw(), progress)
        timings.prompt_seconds = time.perf_counter() - start
        timings.kept = self.cache.kept
        begin = time.perf_counter()
        try:
            while piece := answer.take(token):
                timings.generated_tokens += 1
                timings.generation_seconds = time.perf_counter() - begin
                timings.first_token_seconds = timings.first_token_seconds or time.perf_counter() - start
                if answer.stop_reason:
                    yield Piece(piece.token_id, piece.text + answer.rest())
                    return
                yield piece
                token = step([self], [answer.draw()])[0]
            if rest := answer.rest():
                yield Piece(-1, rest)
        finally:
            timings.generation_seconds = time.perf_counter() - begin
            self.stats = self.summary()

    def step(self):
        """Read the one token generated last; -> logits (vocab,)."""
        return step([self])[0]

    def ask(self, text, params, system=None, progress=None):
        """A turn of a chat: yields the Pieces of the answer. The first turn may set a system prompt."""
        if system is not None and not self.messages:
            self.messages.append({"role": "system", "content": system})
        self._finish_turn()
        user = {"role": "user", "content": text}
        tokenizer = self.llm.tokenizer
        rendered = tokenizer.render_chat([*self.messages, user])
        new = rendered
        if self.rendered is not None:
            # What follows the last answer: the cache holds that answer as it was generated, not as a template trims it.
            marked = [*self.messages[:-1], {"role": "assistant", "content": REPLY}, user]
            head, _, new = tokenizer.render_chat(marked).partition(REPLY)
            if head != self.rendered:  # the template rewrites earlier turns: read all of it again
                self.cache.clear()
                self.unread, self.rendered, new = [], None, rendered
        before, n_before = self.rendered, self.seen_soon
        self.feed(new)
        self.new_turn = True
        self.messages.append(user)
        self.rendered = rendered
        try:
            yield from self.stream(params, progress)
        except MinillmError:
            if not self.answer.token_ids:  # too long, for example: a shorter text may follow in its place
                self.messages.pop()
                self.rendered, self.unread = before, self.unread[: n_before - self.cache.seen]
            raise

    def _finish_turn(self):
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.append({"role": "assistant", "content": self.answer.text if self.answer else ""})

    def summary(self):
        """Counts, seconds and bytes of the last answer, and the cache as it is now: plain values for people and
        JSON."""
        llm, answer, timings = self.llm, self.answer, asdict(self.timings)
        kept = timings.pop("kept")
        return {
            "text": answer.text,
            "stop_reason": answer.stop_reason,
            "load_seconds": llm.load_seconds,
            **timings,
            "peak_bytes": peak_memory(),
            "model": llm.config.name,
            "device": llm.model.ops.DEVICE,
            "cache": {
                "method": llm.cache_config.method,
                "budget": llm.cache_config.as_dict()["budget"],
                "quality": llm.cache_config.quality,
                "kept": kept,
                "entries": self.cache.entries,
                "bytes": self.cache.bytes_in_use,
                "full_bytes": self.cache.full_bytes,
                "tau": llm.cache_config.options.get("tau") if self.cache.tau is None else self.cache.tau,
                "threshold": llm.cache_config.options.get("threshold"),
            },
        }

    def close(self):
        """Give the memory back."""
        self.cache.clear()
        self.unread, self.messages, self.rendered = [], [], None
        self.cache.pool.trim()

    def save(self, path):
        """Write the session to a file (safetensors), all of it or nothing. Raises MinillmError."""
        self._finish_turn()
        state = {"unread": self.unread, "messages": self.messages, "rendered": self.rendered}
        texts = {"minillm_session": json.dumps(self.llm.identity()), "state": json.dumps(state)}
        own_file.write(Path(path).expanduser(), cache_state.state(self.cache), texts)

    def restore(self, path):
        """Take up a saved session. A file that is damaged, or of other weights or another dtype, method or version,
        raises MinillmError and changes nothing."""
        arrays, texts = own_file.read(Path(path).expanduser(), "session", "delete it or name another file")
        saved, cache = json.loads(texts["minillm_session"]), self.llm.new_cache(self.cache.window)
        for name, here in self.llm.identity().items():
            if saved.get(name) != here:
                raise MinillmError(
                    f"{path} was saved with {name} {saved.get(name)!r} and this is {here!r}: name another file or "
                    "delete it"
                )
        try:
            unread, messages, rendered = self._checked(json.loads(texts["state"]))
            self.llm.encode(arrays["token_ids"].tolist())
            self.llm.compressor.check_left(arrays, self.llm.config.n_heads)
            cache_state.restore(cache, arrays)
        except (KeyError, TypeError, ValueError, MinillmError) as error:
            raise MinillmError(f"{path} is damaged ({error}): delete it and read the prompt again") from None
        self.cache.clear()
        self.cache, self.answer = cache, None
        self.unread, self.messages, self.rendered = unread, messages, rendered

    def _checked(self, state):
        """(unread, messages, rendered) of the state that `save` wrote, or KeyError, TypeError, ValueError,
        UsageError."""
        unread, messages, rendered = state["unread"], state["messages"], state["rendered"]
        if not isinstance(unread, list) or not isinstance(messages, list) or not isinstance(rendered, str | None):
            raise TypeError("its state is not an object")
        for message in messages:
            words = isinstance(message, dict) and all(isinstance(text, str) for text in message.values())
            if not words or set(message) != {"role", "content"}:
                raise ValueError("it holds a malformed message")
        return self.llm.encode(unread), messages, rendered
