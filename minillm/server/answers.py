"""The routes that answer: chat and text completions, whole or as a stream of events."""

import asyncio
import contextlib
import hashlib
from functools import lru_cache

from minillm.logprobs import Logprob
from minillm.server import errors, fields, messages, prompt, shapes
from minillm.server.errors import ApiError, bad
from minillm.server.http import Json, encoded, json_body
from minillm.server.metrics import Watch
from minillm.server.places import Gone, until
from minillm.server.snapshots import Prefix, boundaries, keys
from minillm.server.work import Work

MOST_ANSWERS = 128  # of one request: prompts, each n times
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
LAST_WORDS = 1.0  # seconds that a client may take to hear why its stream ends


class Answers:
    """Endpoints of a Server."""

    def __init__(self, server):
        self.server, self.llm, self.settings = server, server.llm, server.settings
        self._compressor = lru_cache(32)(self.llm.compressor_for)

    async def chat(self, request):
        body = await json_body(request, self.settings.max_body)
        return await self._answer(request, body, shapes.Chat, self._chat_prompts)

    async def complete(self, request):
        body = await json_body(request, self.settings.max_body)
        return await self._answer(request, body, shapes.Text, self._text_prompts)

    def _chat_prompts(self, body):
        return [prompt.of_chat(self.llm, messages.checked(body, self.server.files.text))]

    def _text_prompts(self, body):
        """A prompt is a text, token ids, or a list of those."""
        given = body.get("prompt")
        if isinstance(given, str) or (isinstance(given, list) and given and all(map(fields.is_id, given))):
            given = [given]
        if not isinstance(given, list) or not 1 <= len(given) <= MOST_ANSWERS:
            raise bad(
                f"prompt must be a text, a list of token ids, or a list of up to {MOST_ANSWERS} of those", "prompt"
            )
        for one in given:
            if not isinstance(one, str) and not (isinstance(one, list) and all(map(fields.is_id, one))):
                raise bad(f"a prompt must be a text or a list of token ids, not {fields.shown(one)}", "prompt")
        return [prompt.of_text(self.llm, one) for one in given]

    async def _answer(self, request, body, shape, prompts_of):
        wanted = fields.wanted(body, self.settings.params, self.llm.cache_config, chat=shape is shapes.Chat)
        work = await asyncio.to_thread(self._work, body, wanted, prompts_of)
        shape = shape(self.server.model_id, self.fingerprint)
        answer = Answer(self.server, work, shape, wanted)
        await answer.open()
        if wanted.stream:
            return answer
        try:
            return Json(await answer.whole(request.receive))
        except Gone:
            return Json({}, 499)  # nobody reads it

    def _work(self, body, wanted, prompts_of):
        compressor = self.llm.compressor if wanted.cache is None else self._compressor(wanted.cache)
        prompts = prompts_of(body)
        if len(prompts) * len(wanted.params) > MOST_ANSWERS:
            raise bad(f"a request has up to {MOST_ANSWERS} answers: ask for fewer prompts, or a smaller n", "n")
        for one in prompts:
            ends = boundaries(one, compressor, wanted.explicit)
            found = keys(self.llm, compressor, one.ids, ends, wanted.salt)
            one.prefix = Prefix(self.server.snapshots, ends, found, wanted.cache_prompt)
        return Work(self.llm, compressor, prompts, wanted.params, self.settings.ping_interval, wanted.scores)

    @property
    def fingerprint(self):
        """Of the weights and the cache: answers with the same seed are the same as long as it is."""
        about = f"{self.llm.config.name} {self.llm.weights_digest} {self.llm.cache_config!r}"
        return "fp_" + hashlib.sha256(about.encode()).hexdigest()[:12]


class Answer:
    """One answer: an ASGI response that streams it, or `whole`. After `open`, one of the two must be run: it gives
    back what `open` took."""

    def __init__(self, server, work, shape, wanted):
        self.server, self.work, self.shape, self.wanted = server, work, shape, wanted
        self.place, self.gone, self.told = None, False, {}  # told: index of a choice -> shape.logprobs of it
        self.watch = Watch(server.metrics)
        self.deadline = asyncio.get_running_loop().time() + server.settings.timeout

    async def open(self):
        """Refuse what can be refused: what can never be done, and what too many wait for. Raises ApiError."""
        try:
            await self.work.open()
            self.place = self.server.places.ask()
        except BaseException:
            await self.work.leave()
            raise

    async def leave(self):
        """It is over: give everything back, and tell the metrics."""
        try:
            await self.work.leave()
        finally:
            self.server.places.leave(self.place)
            readings = self.work.readers
            for request in readings:
                if request.settles and request.timings.prompt_seconds:
                    self.server.snapshots.events["hit" if request.timings.cached_tokens else "miss"] += 1
            answers = [choice.request.timings for choice in self.work.choices if choice.request]
            self.watch.end(readings, answers, self.gone)

    async def _until(self, work, receive):
        left = max(0.0, self.deadline - asyncio.get_running_loop().time())
        try:
            return await until(work, receive, left, self.server.ending)
        except Gone:
            self.gone = True
            raise
        except asyncio.TimeoutError:
            seconds = self.server.settings.timeout
            message = f"the answer was not there after {seconds:g} seconds: shorten it, or raise --timeout"
            raise ApiError(504, message) from None

    async def _pieces(self):
        """See Work.pieces; also while it waits for a place."""
        while not (await asyncio.wait({self.place}, timeout=self.work.ping))[0]:
            yield None
        self.place.result()
        async with contextlib.aclosing(self.work.pieces()) as pieces:
            async for found in pieces:
                if found and found[1]:
                    self.watch.token(found[0])
                yield found

    async def whole(self, receive):
        """The object of the answer. Raises Gone where nobody waits for it any more."""
        try:
            await self._until(self._all(), receive)
            found = [self._choice(i, choice.request) for i, choice in enumerate(self.work.choices)]
            return self.shape.whole(found, self.usage(), shapes.timings(self.work.timings(0)))
        finally:
            await self.leave()

    def _choice(self, index, request):
        """(text, reason, logprobs)"""
        text, scored = self._echo(index)
        return text + request.text, shapes.REASONS[request.stop_reason], self._tell(index, scored + request.logprobs)

    def _echo(self, index):
        """(text, Logprobs) of a prompt, where that is a part of the answer."""
        choice = self.work.choices[index]
        first, scored = choice.prompt.ids[0], choice.logprobs
        text = choice.prompt.text if self.wanted.echo else ""
        return text, [Logprob(first, None, ()), *scored[1:]] if scored else []

    def _tell(self, index, tokens):
        """What the client is told of Logprobs of tokens that follow those told before; None where there are none."""
        if not tokens:
            return None
        if index not in self.told:
            prompt = self.work.choices[index].prompt if self.wanted.echo else None
            self.told[index] = self.shape.logprobs(self.server.llm, prompt)
        return self.told[index].tell(tokens)

    async def _all(self):
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass

    def usage(self):
        every = [self.work.timings(i) for i in range(len(self.work.choices))]
        return shapes.usage(every[:: self.work.several], every)

    async def __call__(self, scope, receive, send):
        """The answer as events."""

        async def say(data):
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            try:
                await self._until(self._stream(say), receive)
            except Gone:
                return
            except Exception as error:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(say(event(errors.of(error).as_dict())), LAST_WORDS)
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self.leave()

    async def _stream(self, say):
        begun = set()
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for found in pieces:
                if found is None:
                    await say(b": keepalive\n\n")
                    continue
                index, piece = found
                if index not in begun:
                    begun.add(index)
                    if first := self.shape.begin(index):
                        await say(event(self.shape.chunk([first])))
                    if self.wanted.echo:
                        text, scored = self._echo(index)
                        await say(event(self.shape.chunk([self.shape.piece(index, text, self._tell(index, scored))])))
                if piece is None:
                    reason = shapes.REASONS[self.work.choices[index].request.stop_reason]
                    about = shapes.timings(self.work.timings(index))
                    await say(event(self.shape.chunk([self.shape.end(index, reason)], timings=about)))
                    continue
                logprobs = self._tell(index, [piece.logprob] if piece.logprob else [])
                if piece.text or logprobs:
                    await say(event(self.shape.chunk([self.shape.piece(index, piece.text, logprobs)])))
        if self.wanted.include_usage:
            await say(event(self.shape.chunk([], usage=self.usage())))
        await say(b"data: [DONE]\n\n")


def event(value):
    return b"data: " + encoded(value) + b"\n\n"
