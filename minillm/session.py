"""One conversation with a model: what it has read, what it has yet to read, and its compressed cache.

A later turn reads only its own new tokens. A session can be saved to a file and taken up again, and forked."""

import contextlib
import functools
import threading
from dataclasses import asdict

from minillm import session_file
from minillm.compress.config import CacheConfig
from minillm.document import after_document
from minillm.engine.admission import cache_bytes, require, workspace_bytes
from minillm.engine.request import Request, Timings
from minillm.errors import MinillmError, UsageError
from minillm.memory import peak_memory
from minillm.text.tokenizer import StreamDecoder

SETTLED_FROM = 256  # tokens; a shorter prefix is compressed together with what follows it
REPLY = "\u0001reply\u0001"  # stands for the last answer when a template is asked what comes after it


def is_chat(prompt):
    """Whether a prompt is chat messages: a list of dicts."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt)


class Session:
    """A sequence of an LLM. `feed` adds a prompt, `stream` reads it and answers; `ask` is a turn of a chat.

    It is compressed as the LLM's cache is set when it begins. Used by one thread or task at a time."""

    def __init__(self, llm, compressor=None):
        self.llm, self.compressor = llm, compressor or llm.compressor
        config = self.compressor.config
        window = llm.config.reach if config.method == "full" else None
        self.cache = llm.new_cache(window, config.dtype)
        self.unread = []  # token ids that were fed or generated and not read yet
        self.messages = []  # the chat so far; the last one may be a document whose question is yet to come
        self.rendered = None  # the chat template's text up to the last answer, or to the end of that document
        self.new_turn = False  # whether an answer begins a turn, and does not go on where a text ended
        self.answer = None  # the last Request
        self._busy = threading.Lock()
        llm.sessions.add(self)

    @contextlib.contextmanager
    def _use(self):
        """Around what reads or changes the session."""
        if not self._busy.acquire(blocking=False):
            raise UsageError("this session is being used by another thread or task: give each one a session or a fork")
        try:
            yield
        finally:
            self._busy.release()

    @property
    def seen_soon(self):
        return self.cache.seen + len(self.unread)

    @property
    def position_soon(self):
        """Of the next token, which is what the context limits."""
        return self.cache.position + len(self.unread)

    @property
    def timings(self):
        """Timings of the last answer."""
        return self.answer.timings if self.answer else Timings()

    def feed(self, prompt):
        """Add a prompt: text (special tokens in it are recognised), token ids, or chat messages (list of dicts)."""
        ids = self.llm.encode(prompt, bos=self.seen_soon == 0)
        with self._use():
            self._leave_answer()
            self.unread += ids
            self.new_turn = self.new_turn or is_chat(prompt)

    def request(self, params=None, whole=False, result=0, hidden=None, settles=()):
        """A Request that reads what was fed and, with `params`, answers. whole: nothing is compressed; result: bytes
        that the outcome takes; hidden: (1, dim) state after what was read, where nothing is left to be; settles: see
        Request. Raises MinillmError if what was fed is nothing or does not fit into the context, and for params that
        this model cannot follow."""
        llm = self.llm
        if not self.unread and hidden is None:
            raise MinillmError("the prompt is empty: give some text")
        if self.position_soon > llm.context:
            raise MinillmError(
                f"the prompt has {self.seen_soon} tokens and the context {llm.context}: shorten it, raise "
                f"-c/--ctx-size (the model's own limit is {llm.config.context}), or take a model with a longer context"
            )
        compressor = None if whole else self.compressor
        matcher = llm.matcher(params) if params else None
        model, cache = self.compressor.model, self.cache
        request = Request(model, compressor, cache, self.unread, params, context=llm.context, matcher=matcher)
        request.hidden, request.settles = hidden, tuple(settles)
        request.check_memory = functools.partial(self._check_memory, self.seen_soon, len(self.unread), whole, result)
        if params is not None:
            request.stop_ids = frozenset() if params.ignore_eos else llm.stop_ids
            if llm.tokenizer:
                continues = not self.new_turn or matcher is not None  # a constraint is of the leading space, too
                request.decoder = StreamDecoder(llm.tokenizer, params.stop, continues=continues)
            elif params.stop:
                raise MinillmError("stop texts need a tokenizer, and this model has none: add its tokenizer.json")
        return request

    def _check_memory(self, n, n_new, whole, result):
        """Raise MinillmError if n tokens, n_new of them yet to be read, do not fit into the memory there is."""
        llm, ops = self.llm, self.compressor.ops
        more = cache_bytes(llm.config, CacheConfig("full") if whole else self.compressor.config, ops, n)
        more = max(0, more - self.cache.bytes_in_use)
        require(ops, "the prompt", n, cache=more, workspace=workspace_bytes(llm.config, n_new) + result)

    def run(self, request, progress=None):
        """Have the engine do all of a Request; raises what it failed with."""
        self._leave_answer()
        self.llm.engine.run([request], progress and _told(progress, request))
        if request.error is not None:
            raise request.error

    def read(self, progress=None):
        """Read what was fed; -> logits (vocab,) after its last token. progress(layers done, layers)."""
        with self._use():
            request = self.request()
            self.run(request, progress)
            with self.llm.engine.alone():
                return request.model.logits(request.hidden[-1:])[0]

    def stream(self, params, progress=None):
        """Read what was fed and answer: yields Pieces; `self.answer` and `self.timings` tell how it went. The state
        is whole at every yield, and that of the pieces taken, so that an answer may be left at any time."""
        with self._use():
            self._leave_answer()
            request = self.request(params)
            request.pull, self.answer = True, request
            (engine := self.llm.engine).submit(request)
        see = progress and _told(progress, request)
        try:
            while True:
                with self._use():
                    if self.answer is not request:
                        raise UsageError("this answer was left, and its session went on: take the newer answer")
                    piece = engine.next(request, see)
                if piece is None:
                    return
                yield piece
        finally:
            engine.cancel(request)

    def _leave_answer(self):
        if self.answer:
            self.llm.engine.cancel(self.answer)

    def ask(self, text, params, system=None, progress=None):
        """A turn of a chat: yields the Pieces of the answer. The first turn may set a system prompt."""
        with self._use():
            self._leave_answer()
            undo = self._begin_turn(text, system)
            seen, messages = self.cache.seen, self.messages
        try:
            yield from self.stream(params, progress)
        except Exception:
            if self.messages is messages and self.cache.seen <= seen:  # too long, for example: a shorter one may follow
                undo()
            raise

    def _begin_turn(self, text, system):
        """Feed a user's turn. -> a function that takes it back, if nothing of it was read."""
        before = list(self.messages)
        try:
            user, head, new, rendered = self._render_turn(text, system)
        except Exception:  # the template refuses it
            self.messages = before
            raise
        if head != self.rendered:  # the template rewrites earlier turns: read all of it again
            self._clear()
            self.rendered, new = None, rendered
        rendered_before, n_before = self.rendered, self.seen_soon
        self.unread += self.llm.encode(new, bos=n_before == 0)
        self.new_turn, self.rendered = True, rendered
        self.messages.append(user)

        def undo():
            self.messages, self.rendered = before, rendered_before
            del self.unread[max(n_before - self.cache.seen, 0) :]

        return undo

    def _render_turn(self, text, system):
        """-> the user's message; what the template makes of the messages before it, of what is new, and of all."""
        if system is not None and not self.messages:
            self.messages.append({"role": "system", "content": system})
        self._finish_turn()
        render = self.llm.render_chat
        if self.open:
            user = after_document(self.messages.pop(), text)
            rendered = render([*self.messages, user])
            return user, rendered[: len(self.rendered)], rendered[len(self.rendered) :], rendered
        user = {"role": "user", "content": text}
        rendered = render([*self.messages, user])
        if self.rendered is None:
            return user, None, rendered, rendered
        # What follows the last answer: the cache holds it as it was generated, not as a template trims it.
        marked = [*self.messages[:-1], {"role": "assistant", "content": REPLY}, user]
        head, _, new = render(marked).partition(REPLY)
        return user, head, new, rendered

    def _finish_turn(self):
        if self.messages and self.messages[-1]["role"] == "user" and not self.open:
            self.messages.append({"role": "assistant", "content": self.answer.text if self.answer else ""})

    # a document: read once, asked many times

    @property
    def open(self):
        """Whether the last message is a document whose question is yet to come."""
        return bool(self.messages) and self.messages[-1]["role"] == "user" and self.answer is None

    def feed_document(self, prompt):
        """Add a prompt that questions follow: text or chat messages, for the model's chat template up to the question;
        token ids, or text where there is no template, as they are."""
        tokenizer = self.llm.tokenizer
        if not (is_chat(prompt) or (isinstance(prompt, str) and tokenizer and tokenizer.has_chat_template)):
            self.feed(prompt)
            return
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if messages[-1].get("role") != "user":
            messages.append({"role": "user", "content": ""})
        head, mark, _ = self.llm.render_chat([*messages[:-1], after_document(messages[-1], REPLY)]).partition(REPLY)
        if not mark:
            raise UsageError("the chat template loses what follows a document: give token ids, or another template")
        with self._use():
            self.unread += self.llm.encode(head, bos=self.seen_soon == 0)
            self.messages, self.rendered = messages, head

    def settle(self, progress=None):
        """Read what was fed, and have no later compression touch it, so that forks share its pages for good. Fewer than
        SETTLED_FROM tokens stay part of what follows."""
        self.compressor.check_settles()
        with self._use():
            if self.unread:
                self.run(self.request(), progress)
            with self.llm.engine.alone():
                if self.cache.seen - self.cache.settled_tokens >= SETTLED_FROM:
                    self.cache.settle()

    def fork(self):
        """A second session with the same past. Pages are shared until one of the two changes them."""
        with self.llm.engine.alone(), self._use():
            other = Session(self.llm, self.compressor)
            other.cache = self.cache.fork()
            other.unread, other.messages = list(self.unread), list(self.messages)
            other.rendered, other.new_turn = self.rendered, self.new_turn
            if other.messages and other.messages[-1]["role"] == "user" and not self.open:
                other.messages.append({"role": "assistant", "content": self.answer.text})
            return other

    @property
    def stats(self):
        """Counts, seconds and bytes of the last answer, and the cache as it is now: plain values for people and JSON.
        Empty before the first."""
        llm, answer, config = self.llm, self.answer, self.compressor.config
        if answer is None:
            return {}
        timings = asdict(self.timings)
        kept = timings.pop("kept")
        return {
            "text": answer.text,
            "stop_reason": answer.stop_reason,
            "load_seconds": llm.load_seconds,
            **timings,
            "peak_bytes": peak_memory(),
            "model": llm.config.name,
            "device": self.compressor.ops.DEVICE,
            "cache": {
                "method": config.method,
                "budget": config.as_dict()["budget"],
                "quality": config.quality,
                "kept": kept,
                "entries": self.cache.entries,
                "bytes": self.cache.bytes_in_use,
                "full_bytes": self.cache.full_bytes,
                "tau": config.options.get("tau") if self.cache.tau is None else self.cache.tau,
                "threshold": self.compressor.recipe.options.get("threshold"),
            },
        }

    def _clear(self):
        with self.llm.engine.alone():
            self.cache.clear()
        self.unread = []

    def close(self):
        """Give the memory back."""
        with self._use():
            self._leave_answer()
            self.llm.engine.between_steps(self._give_back)
            self.unread, self.messages, self.rendered = [], [], None

    def _give_back(self):
        self.cache.clear()
        self.cache.pool.unreserve(self.cache)  # what answers in forks would have counted on
        self.cache.pool.trim()

    def save(self, path):
        """Write the session to a file (safetensors), all of it or nothing. Raises MinillmError."""
        with self._use():
            self._finish_turn()
            session_file.write(self, path)

    def restore(self, path):
        """Take up a saved session. A file that is damaged, or of other weights or another dtype, method or version,
        raises MinillmError and changes nothing."""
        arrays, texts = session_file.opened(self, path)
        with self._use(), self.llm.engine.alone():
            cache, state = session_file.read(self, path, arrays, texts)
            self._leave_answer()
            self.cache.clear()
            self.cache, self.answer = cache, None
            self.unread, self.messages, self.rendered = state


def _told(progress, request):
    """A function that calls progress(layers done, layers) where a request has read on."""
    n, told = len(request.model.blocks), 0.0

    def see():
        nonlocal told
        if request.share > told:
            told = request.share
            progress(told * n, n)

    return see
