"""Engine: any number of threads and tasks, one owner of model and pages at a time.

Whoever waits for its own answer while nobody else does makes the steps itself. As soon as others wait, too, one thread
makes the steps of all: so nobody's Ctrl-C ever falls into another's step. Model and pages are touched in `alone`."""

import asyncio
import atexit
import contextlib
import functools
import os
import threading
import time
import weakref
from collections import deque

import numpy as np

from minillm.engine.scheduler import Scheduler
from minillm.errors import MinillmError

LINGER = 0.001  # seconds that a step waits for those who have just taken a piece: decoded together, it costs less
IDLE = 0.1  # seconds without work after which the thread ends

ENGINES = weakref.WeakSet()


class Engine:
    """Takes Requests, and hands their pieces out as they are generated."""

    def __init__(self):
        self.scheduler = Scheduler()
        self.turn = threading.Condition()
        self.line = deque()  # threads (idents) that are to touch model and pages; the first of them does
        self.later = deque()  # work that came up while its own thread had the model: see `between_steps`
        self.thread = None  # that makes the steps of all
        self.last_turn = 0.0  # when that thread last made a step, or found work after a pause
        self.stopping = self.closed = False
        ENGINES.add(self)

    # one owner at a time

    @property
    def mine(self):
        """Whether this thread owns the model now."""
        return bool(self.line) and self.line[0] == threading.get_ident()

    @contextlib.contextmanager
    def alone(self):
        """Model and pages are this thread's: no step is under way. First come, first served."""
        me = threading.get_ident()
        if self.mine:
            yield
            return
        try:
            with self.turn:
                self.line.append(me)
                self.turn.wait_for(lambda: self.line[0] == me)
            yield
        finally:
            try:
                while self.mine and self.later:
                    self.later.popleft()()
            finally:
                with self.turn:
                    if me in self.line:
                        self.line.remove(me)
                    self.turn.notify_all()

    def between_steps(self, work):
        """Do work() where no step is under way: now, or, if garbage is collected within a step, when that is over."""
        if self.mine:
            self.later.append(work)
        else:
            with self.alone():
                work()

    # requests

    def submit(self, *requests):
        """They go on as soon as they are wanted; what is submitted together comes one right after the other."""
        if self.closed:
            raise MinillmError("this LLM is closed and its memory given back: load it again")
        self.scheduler.submit(*requests)

    def cancel(self, request):
        """It ends where it is; what a reading had added is gone."""
        if not request.over:
            self.between_steps(lambda: self.scheduler.end(request, "cancelled"))

    def run(self, requests, see=None):
        """Answer them. An exception on the way (Ctrl-C) cancels them; theirs are kept in `error`."""
        try:
            self.submit(*requests)
            self._wait(requests, lambda: all(request.over for request in requests), see)
        finally:
            for request in requests:
                self.cancel(request)

    def next(self, request, see=None):
        """The next Piece of a request, or None at the end; raises what it failed with. see(): called after steps."""
        request.asked = True
        try:
            self._wait([request], lambda: request.ready, see)
        except BaseException:
            self.cancel(request)
            raise
        return request.pop()

    async def arrival(self, *requests):
        """Return when a piece, or the end, of one of them can be taken."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)

        for request in requests:
            request.wake = wake
        while not any(request.ready for request in requests):
            event.clear()
            for request in requests:
                request.asked = True
            with self.turn:
                self._start()
            if not any(request.ready for request in requests):
                await event.wait()

    # steps

    def _wait(self, requests, ready, see):
        while not ready():
            if self.mine or self._nobody_else(requests):
                with self.alone():
                    moved = self.scheduler.step(requests)
                if not moved and not ready():
                    with self.turn:
                        self.turn.wait(LINGER)  # memory is promised to others
            else:
                with self.turn:
                    self._start()
                    if not ready():
                        self.turn.wait()
            if see:
                see()

    def _nobody_else(self, requests):
        return self.thread is None and all(request in requests for request in self.scheduler.wanted())

    def _start(self):
        """Have the thread go on. Called with `turn` held."""
        if self.thread is None and not self.stopping:
            thread = threading.Thread(target=self._steps, name="minillm", daemon=True)
            self.last_turn = time.monotonic()
            thread.start()
            self.thread = thread
        self.turn.notify_all()

    def _steps(self):
        with np.errstate(over="ignore", invalid="ignore"):  # the model looks at what comes out, and says it better
            while self._go_on():
                with self.alone():
                    moved = self.scheduler.step()
                self.last_turn = time.monotonic()
                for request in moved:
                    if request.wake and request.ready:
                        request.wake()
                with self.turn:
                    self.turn.notify_all()
                    if moved:
                        self.turn.wait_for(functools.partial(_back, moved), LINGER)
                    else:  # memory is promised to those who have not come back
                        self.turn.wait(LINGER)

    def stuck(self, seconds):
        """Whether its thread has made no step for so long, though there is work."""
        return self.thread is not None and bool(self.scheduler.wanted()) and time.monotonic() - self.last_turn > seconds

    def _go_on(self):
        """Wait for work. -> False: there is none, and the thread is no more."""
        with self.turn:
            self.turn.wait_for(lambda: self.stopping or self.scheduler.wanted(), IDLE)
            if self.scheduler.wanted() and not self.stopping:
                return True
            self.thread = None
            self.turn.notify_all()
            return False

    def close(self):
        """Nothing is answered any more; what is on the way fails."""
        self.closed = True
        with self.alone():
            for request in list(self.scheduler.requests):
                self.scheduler.end(request, "failed", MinillmError("this LLM was closed before its answer was there"))
                if request.wake:
                    request.wake()
        self.stop()

    def stop(self):
        """End the thread, after the step that it makes."""
        self.stopping = True
        with self.turn:
            self.turn.notify_all()
        if (thread := self.thread) and thread is not threading.current_thread():
            thread.join()

    # a process that forks: the child has no threads but the one that forked

    def before_fork(self):
        self.forks_within = self.mine
        if not self.mine:
            with self.turn:
                self.line.append(me := threading.get_ident())
                self.turn.wait_for(lambda: self.line[0] == me)

    def after_fork(self, child):
        """Go on; in the child without the thread and without what other threads waited for."""
        if child:
            self.turn, self.thread = threading.Condition(), None
            self.line = deque([threading.get_ident()])
            self.scheduler.requests = [request for request in self.scheduler.requests if not request.wanted]
        if not self.forks_within:
            with self.turn:
                self.line.popleft()
                self.turn.notify_all()


def _back(requests):
    return all(request.wanted or request.over for request in requests)


def _each(work, *arguments):
    for engine in sorted(ENGINES, key=id):
        work(engine, *arguments)


atexit.register(_each, Engine.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _each(Engine.before_fork),
        after_in_parent=lambda: _each(Engine.after_fork, False),
        after_in_child=lambda: _each(Engine.after_fork, True),
    )
