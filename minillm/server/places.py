"""Places: how many requests are answered at a time, how many may wait, and how long each may take."""

import asyncio
import math
from collections import deque

from minillm.server.errors import ApiError

LEAST, MOST = 1, 60  # seconds that a client is told to wait
WEIGHT = 0.2  # of the newest answer in the mean of what one takes


class Places:
    """First come, first served. Used in the event loop's thread alone."""

    def __init__(self, n, queue):
        self.n, self.free, self.queue = n, n, queue
        self.waiting = deque()  # a Future each
        self.seconds = 1.0  # that a place is held, on average
        self.closed = None  # the ApiError that everybody gets, once the server is about to end

    @property
    def taken(self):
        return self.n - self.free

    def ask(self):
        """A Future that is done when there is a place. Raises ApiError where too many wait."""
        if self.closed:
            raise self.closed
        if not self.free and len(self.waiting) >= self.queue:
            after = max(LEAST, min(MOST, math.ceil(self.seconds * (len(self.waiting) + 1) / self.n)))
            message = f"{self.taken} requests are being answered and {len(self.waiting)} wait: ask again later"
            raise ApiError(503, message, type="overloaded_error", retry_after=after)
        place = asyncio.get_running_loop().create_future()
        if self.free:
            self._give(place)
        else:
            self.waiting.append(place)
        return place

    def _give(self, place):
        self.free -= 1
        place.set_result(asyncio.get_running_loop().time())

    def leave(self, place):
        """Give a place back, or wait for it no more."""
        if place in self.waiting:
            self.waiting.remove(place)
        if not place.done():
            place.cancel()
        elif not place.cancelled() and place.exception() is None:
            took = asyncio.get_running_loop().time() - place.result()
            self.seconds += WEIGHT * (took - self.seconds)
            self.free += 1
            if self.waiting:
                self._give(self.waiting.popleft())

    def close(self, error):
        """Nobody gets a place any more: an ApiError is what they get instead."""
        self.closed = error
        while self.waiting:
            self.waiting.popleft().set_exception(error)


class Gone(Exception):
    """The client has closed the connection."""


async def until(work, receive, seconds, ending):
    """What the coroutine `work` returns. Raises Gone as soon as the client is, asyncio.TimeoutError after so many
    seconds, and ApiError with the Future `ending`; then the work was cancelled, and is over."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        done, _ = await asyncio.wait({task, gone, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise Gone
        if ending in done:
            raise ApiError(503, "this server has shut down before the answer was there: ask another one")
        raise asyncio.TimeoutError
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass
