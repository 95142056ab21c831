"""The application: routes, each also without /v1, and what stands before them."""

import asyncio
import time
from functools import cached_property

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from minillm.server.about import About
from minillm.server.answers import Answers
from minillm.server.disk import Disk
from minillm.server.errors import ApiError
from minillm.server.files import Files
from minillm.server.http import Keys, guarded, http_error
from minillm.server.metrics import Counted, Metrics
from minillm.server.page import FILES, page
from minillm.server.places import Places
from minillm.server.snapshots import Snapshots
from minillm.server.texts import Texts


class Server:
    """One LLM, its Settings, and the state of the server: what the routes share."""

    def __init__(self, llm, settings):
        self.llm, self.settings = llm, settings
        self.created = int(time.time())
        self.places = Places(settings.parallel, settings.max_queue)
        limit = None if llm.cache_limit is None else llm.cache_limit // 2
        disk = settings.cache_disk and Disk(settings.cache_disk, settings.cache_disk_limit)
        self.snapshots = Snapshots(limit if settings.cache_ram is None else settings.cache_ram, disk)
        llm.engine.scheduler.idle = self.snapshots
        self.metrics = Metrics(self)
        self.about, self.answers, self.texts, self.files = About(self), Answers(self), Texts(self), Files(self)

    @cached_property
    def ending(self):
        """A Future of the event loop's: done when answers that are still on the way are to end."""
        return asyncio.get_running_loop().create_future()

    @property
    def draining(self):
        """Whether the server is about to end."""
        return self.places.closed is not None

    def drain(self):
        """Take nothing more: who waits for a place is told so, and what is being answered goes on."""
        self.places.close(ApiError(503, "this server is shutting down: ask another one"))

    @property
    def model_id(self):
        return self.settings.aliases[0] if self.settings.aliases else self.llm.config.name

    def close(self, write=True):
        """Give the memory of snapshots back. write: to the disk, if there is one."""
        with self.llm.engine.alone():
            if not write:
                self.snapshots.disk = None
            self.snapshots.close()
            self.llm.engine.scheduler.idle = None

    def routes(self):
        """(path, endpoint, method)"""
        about, answers, texts, files = self.about, self.answers, self.texts, self.files
        yield "/health", about.health, "GET"
        yield "/livez", about.livez, "GET"
        yield "/models", about.models, "GET"
        yield "/models/{name:path}", about.model, "GET"
        yield "/props", about.props, "GET"
        yield "/slots", about.slots, "GET"
        yield "/metrics", about.metrics, "GET"
        yield "/chat/completions", answers.chat, "POST"
        yield "/completions", answers.complete, "POST"
        yield "/files", files.upload, "POST"
        yield "/files", files.list, "GET"
        yield "/files/{id}", files.get, "GET"
        yield "/files/{id}", files.delete, "DELETE"
        yield "/files/{id}/content", files.content, "GET"
        yield "/cache/{id}", files.cache, "GET"
        yield "/tokenize", texts.tokenize, "POST"
        yield "/detokenize", texts.detokenize, "POST"
        yield "/apply-template", texts.apply_template, "POST"


def application(server):
    """The ASGI application of a Server."""
    routes = [
        Route(prefix + path, guarded(endpoint), methods=[method])
        for path, endpoint, method in server.routes()
        for prefix in ("/v1", "")
    ]
    if server.settings.webui:
        routes += [Route(path, guarded(page), methods=["GET"]) for path in FILES]
    origins = server.settings.cors_origins
    anybody = {"allow_origin_regex": ".*"} if "*" in origins else {"allow_origins": origins}
    paths = [path for path, _, _ in server.routes()]
    middleware = [
        Middleware(Counted, metrics=server.metrics, routes=paths),
        Middleware(CORSMiddleware, **anybody, allow_methods=["*"], allow_headers=["*"]),
        Middleware(Keys, keys=server.settings.api_keys),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})
    app.router.redirect_slashes = False
    return app
