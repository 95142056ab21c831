"""Listener: uvicorn with an end of ours. On SIGTERM or SIGINT the server takes nothing more, and what is being answered
may go on for a while; on a second signal it ends at once."""

import asyncio

import uvicorn

from minillm.server.app import application

GRACE = 5  # seconds that connections may take to close once their answers are over
LOOK = 0.05  # seconds between two looks at whether all answers are over


class Listener(uvicorn.Server):
    def __init__(self, server):
        self.server, self.loop = server, None
        config = uvicorn.Config(
            application(server),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)

    async def startup(self, sockets=None):
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets=None):
        await super().shutdown(sockets)
        await self.server.files.stop()
        await asyncio.to_thread(self.server.close, not self.force_exit)

    def handle_exit(self, sig, frame):
        """A signal came, in whatever thread."""
        if self.loop is None:  # nobody can have asked yet
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(self._end)

    def _end(self):
        if self.server.draining:
            self.force_exit = self.should_exit = True
        else:
            self.server.drain()
            self.ending = asyncio.ensure_future(self._finish())

    async def _finish(self):
        """Let answers end, and then the server."""
        places, end = self.server.places, self.loop.time() + self.server.settings.drain_timeout
        while places.taken and self.loop.time() < end:
            await asyncio.sleep(LOOK)
        if not self.server.ending.done():
            self.server.ending.set_result(None)
        while places.taken and self.loop.time() < end + GRACE:
            await asyncio.sleep(LOOK)
        self.should_exit = True
