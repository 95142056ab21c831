"""Listener: uvicorn with an end of ours. On SIGTERM or SIGINT the server takes nothing more, and what is on the way may
be finished; on a second one it ends at once."""

import uvicorn

from minillm.server.app import application


class Listener(uvicorn.Server):
    def __init__(self, server):
        self.server = server
        config = uvicorn.Config(
            application(server),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    def handle_exit(self, sig, frame):
        self.force_exit = self.should_exit
        self.should_exit = True
