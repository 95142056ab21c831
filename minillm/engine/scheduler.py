"""Scheduler: whose turn it is. Plain logic, without threads: one `step` at a time, of whoever owns the model."""

import time
import traceback

from minillm.engine.admission import HELD, promise
from minillm.errors import MemoryShort

PATIENCE = 10.0  # seconds that a request waits for memory while nothing goes on that would free it


class Scheduler:
    """Requests in the order of their arrival.

    A step lets in whoever fits, reads the oldest that is reading through one block of the model, and decodes one token
    of all that generate: those of one model and one pool of pages together. A request that fails ends alone."""

    def __init__(self, clock=time.monotonic):
        self.requests, self.clock = [], clock
        self.idle = None  # what may go where somebody does not fit: bytes_in_use, and drop(), which gives some back
        self.stalled = None  # since when nobody goes on, and somebody waits for memory

    def submit(self, *requests):
        """They wait for their turn; who goes on after what was read already goes before those that have nothing to give
        back, and may wait for just that memory."""
        at = len(self.requests) if any(one.hidden is None for one in requests) else self._first_waiting()
        self.requests[at:at] = requests

    def _first_waiting(self):
        waits = (i for i, one in enumerate(self.requests) if one.state == "waiting" and one.hidden is None)
        return next(waits, len(self.requests))

    def wanted(self):
        """Requests that are to go on now."""
        return [request for request in list(self.requests) if request.wanted]

    def step(self, only=None):
        """One turn of those that are wanted; only: some of them. -> the requests that went on."""
        turn = [request for request in self.wanted() if only is None or request in only]
        self._admit([request for request in turn if request.state == "waiting"])
        moved = [request for request in turn if request.state == "reading"][:1]
        for request in moved:
            self._alone(request, request.read_on)
        for batch in batches([request for request in turn if request.state == "generating" and request.wanted]):
            self._decode(batch)
            moved += [request for request in batch if request not in moved]
        return moved + [request for request in turn if request.over and request not in moved]

    def end(self, request, state="done", error=None):
        """A request is over: its promise with it, but for that which answers in forks count on."""
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # the arrays of a reading; its lines stay
        if not request.over:
            request.finish(state, error)
        if request in self.requests:
            self.requests.remove(request)
            if not (request.answers and request.state == "done"):
                request.cache.pool.unreserve(request.cache)

    def _alone(self, request, work, *arguments):
        """What is done for one request: an exception is its own."""
        try:
            work(*arguments)
        except Exception as error:
            self.end(request, "failed", error)
        if request.over:
            self.end(request)

    def _admit(self, waiting):
        for request in waiting:
            if not self._let_in(request):
                break  # first come, first served
        else:
            self.stalled = None

    def _let_in(self, request):
        """-> whether those behind it may be let in."""
        try:
            if request.look:
                request.look(request)
            if self._fits(request):
                request.admit()
            elif self._stalls():
                raise MemoryShort(HELD)
            else:
                return False
        except Exception as error:
            self.end(request, "failed", error)
        return True

    def _fits(self, request):
        """Whether its memory is promised now, if need be in place of what is idle; where that does not suffice, it
        stays."""
        pool, n = request.cache.pool, promise(request)
        while missing := pool.missing(request.cache, n):
            if not self.idle or missing * pool.page_bytes > self.idle.bytes_in_use:
                return False
            self.idle.drop()
        return pool.reserve(request.cache, n)

    def _stalls(self):
        """Whether for a while nothing has gone on that would give memory back."""
        if any(request.state != "waiting" for request in self.wanted()):
            self.stalled = None
            return False
        now = self.clock()
        self.stalled = now if self.stalled is None else self.stalled
        return now - self.stalled > PATIENCE

    def _decode(self, batch):
        """One token of each of a batch. Where that fails, of each alone."""
        ids, caches = [request.unread[0] for request in batch], [request.cache for request in batch]
        on_host = any(request.on_host for request in batch)
        try:
            draws = None if on_host else [request.draw() for request in batch]
            found = batch[0].model.decode(ids, caches, draws)
        except Exception as error:
            if len(batch) == 1:
                self.end(batch[0], "failed", error)
            else:
                for request in batch:
                    self._decode([request])
            return
        for request, one in zip(batch, found, strict=True):  # a token, or the logits of it
            self._alone(request, request.decoded, one)


def batches(requests):
    """Lists of requests that are decoded together: of one model and one pool. On a backend without a runner (NumPy)
    each by itself: the rounding of its products hangs on the number of rows, and an answer is not to hang on others."""
    found = {}
    for request in requests:
        key = (id(request.model), id(request.cache.pool)) if request.model.runner else id(request)
        found.setdefault(key, []).append(request)
    return list(found.values())
