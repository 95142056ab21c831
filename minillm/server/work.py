"""Work: the engine's requests of one HTTP request, from prompts to pieces, and what is given back at its end."""

import asyncio
import threading

from minillm import likelihood
from minillm.engine import admission
from minillm.engine.request import Timings


class Choice:
    """One answer in the making."""

    def __init__(self, prompt, params):
        self.prompt, self.params = prompt, params
        self.session = self.request = None
        self.logprobs = []  # of each token of the prompt, None of the first; where they are asked for
        self.reading = None  # Timings of the request that read the prompt, where several answers share that


class Work:
    """Answers to some Prompts, each of them `len(params)` times.

    Sessions and requests are made by `open`, and given back by `leave`, whatever happened in between. What may block
    is done in threads: `changing` is held by who makes or gives back."""

    def __init__(self, llm, compressor, prompts, params, ping=None, scores=None):
        """prompts: each with its prefix. params: SamplingParams of each choice, or None, which says nothing. ping:
        seconds, see `pieces`. scores: how many of the likeliest the tokens of prompts are told with; None: they are
        only read."""
        self.llm, self.engine, self.compressor, self.ping = llm, llm.engine, compressor, ping
        self.choices = [Choice(prompt, one) for prompt in prompts for one in params]
        self.several, self.scores = len(params), scores
        self.apart = self.several > 1 or scores is not None  # whether prompts are read before answers begin
        self.readings = {}  # Request that only reads -> the choices that wait for it
        self.readers = []  # Requests, one of each prompt, that read it
        self.changing, self.left = threading.Lock(), False

    async def open(self):
        """Make the sessions and their first requests. Raises MinillmError for what can never be."""
        await asyncio.to_thread(self._open)

    def _open(self):
        with self.changing:
            for first in range(0, len(self.choices), self.several):
                if not self.left:
                    self._begin(self.choices[first : first + self.several])

    def _begin(self, choices):
        """The session and the request that read the prompt of some choices."""
        one = choices[0]
        one.session = self.llm.session(self.compressor)
        one.session.new_turn = not one.prompt.continues
        one.session.feed(one.prompt.ids)
        room = 0 if self.scores is None else likelihood.workspace(self.llm)
        request = one.session.request(None if self.apart else one.params, result=room)
        one.prompt.prefix.attach(request)
        if self.apart:
            request.answers = tuple(choice.params for choice in choices if choice.params is not None)
            for params in request.answers[:1]:
                self.llm.matcher(params)  # what it refuses is refused now
        admission.check(request)
        self.readers.append(request)
        if self.apart:
            self.readings[request] = choices
        else:
            one.request = request

    async def pieces(self):
        """Submits what `open` made, and yields (index of a choice, Piece); (index, None) where that answer is over;
        None after `ping` seconds without any. Raises what one of them failed with."""
        waiting = {choice.request: i for i, choice in enumerate(self.choices) if choice.request}
        for request in [*waiting, *self.readings]:
            self.engine.submit(request)
        while waiting or self.readings:
            arrival = asyncio.ensure_future(self.engine.arrival(*waiting, *self.readings))
            try:
                while not (await asyncio.wait({arrival}, timeout=self.ping))[0]:
                    yield None
            finally:
                arrival.cancel()
            for request in [request for request in self.readings if request.over]:
                request.pop()
                choices = await asyncio.to_thread(self._fork, request)
                waiting |= {choice.request: self.choices.index(choice) for choice in choices}
                self.engine.submit(*(choice.request for choice in choices if choice.request is not request))
            for request in [request for request in waiting if request.ready]:
                over = request.over  # as it is now: what comes after this look is for the next round
                while piece := request.pop():
                    yield waiting[request], piece
                if over:
                    index = waiting.pop(request)
                    if waiting:  # perhaps for its memory
                        await asyncio.to_thread(self._close, self.choices[index])
                    yield index, None

    def _close(self, choice):
        """Give the memory of an answer back, which is over."""
        with self.changing:
            choice.session.close()

    def _fork(self, reading):
        """The prompt was read: a session and a request for each choice that waited for that; the reading itself for one
        that says nothing. -> these choices"""
        with self.changing:
            choices = self.readings.pop(reading)
            first, scored = choices[0].session, []
            if self.scores is not None:
                for part in likelihood.of_read(self.llm, reading, choices[0].prompt.ids, self.scores):
                    scored += part
                    if self.left:
                        break
            hidden, reading.hidden = reading.hidden[-1:], None
            for choice in choices if not self.left else ():
                choice.logprobs = scored
                if choice.params is None:
                    choice.request = reading
                    continue
                choice.session = choice.session or first.fork()
                choice.request = choice.session.request(choice.params, hidden=hidden)
                choice.reading = reading.timings
            return choices if not self.left else ()

    async def leave(self):
        """Cancel what goes on, and give the memory back; also where the task is cancelled once more meanwhile."""
        self.left = True
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._leave))

    def _leave(self):
        with self.changing:
            for request in [*self.readings, *(choice.request for choice in self.choices if choice.request)]:
                self.engine.cancel(request)
            for choice in self.choices:
                if choice.session:
                    choice.session.close()

    def timings(self, index):
        """Timings of a choice: of its prompt and its answer."""
        choice = self.choices[index]
        own = choice.request.timings
        if choice.reading is None:
            return own
        read = choice.reading
        answer = {"generated_tokens": own.generated_tokens, "generation_seconds": own.generation_seconds}
        prompt = {"prompt_tokens": read.prompt_tokens, "cached_tokens": read.cached_tokens}
        seconds = read.prompt_seconds + own.prompt_seconds
        return Timings(**prompt, **answer, prompt_seconds=seconds, first_token_seconds=seconds, kept=own.kept)
