"""The application: routes, each also without /v1, and what stands before them."""

import asyncio
import time
from functools import cached_property

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from minillm.server.answers import Answers
from minillm.server.errors import ApiError
from minillm.server.http import Json, Keys, guarded, http_error
from minillm.server.places import Places
from minillm.server.snapshots import Snapshots

STUCK = 60.0  # seconds without a step while there is work, after which the engine is thought to be stuck


class Server:
    """One LLM, its Settings, and the state of the server: what the routes share."""

    def __init__(self, llm, settings):
        self.llm, self.settings = llm, settings
        self.created = int(time.time())
        self.places = Places(settings.parallel, settings.max_queue)
        limit = None if llm.cache_limit is None else llm.cache_limit // 2
        self.snapshots = Snapshots(limit if settings.cache_ram is None else settings.cache_ram)
        llm.engine.scheduler.spare = self.snapshots.drop
        self.answers = Answers(self)

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

    def close(self):
        """Give the memory of snapshots back."""
        with self.llm.engine.alone():
            self.snapshots.clear()
            self.llm.engine.scheduler.spare = None

    async def health(self, request):
        """Whether it takes requests."""
        if self.draining:
            raise self.places.closed
        return Json({"status": "ok"})

    async def livez(self, request):
        """Whether its engine goes on."""
        if self.llm.engine.stuck(STUCK):
            raise ApiError(503, f"the engine has made no step for {STUCK:.0f} seconds: restart the server")
        return Json({"status": "ok"})

    def about_model(self):
        config = self.llm.config
        meta = {"n_ctx": self.llm.context, "n_ctx_train": config.context, "n_vocab": config.vocab_size}
        about = {"id": self.model_id, "object": "model", "created": self.created, "owned_by": "minillm"}
        return about | {"aliases": list(self.settings.aliases), "meta": meta | {"n_embd": config.dim}}

    async def models(self, request):
        return Json({"object": "list", "data": [self.about_model()]})

    async def model(self, request):
        name = request.path_params["name"]
        if name not in (self.model_id, *self.settings.aliases):
            raise ApiError(404, f"there is no model {name!r} here, but {self.model_id!r}", param="model")
        return Json(self.about_model())

    def routes(self):
        """(path, endpoint, method)"""
        yield "/health", self.health, "GET"
        yield "/livez", self.livez, "GET"
        yield "/models", self.models, "GET"
        yield "/models/{name:path}", self.model, "GET"
        yield "/chat/completions", self.answers.chat, "POST"
        yield "/completions", self.answers.complete, "POST"


def application(server):
    """The ASGI application of a Server."""
    routes = [
        Route(prefix + path, guarded(endpoint), methods=[method])
        for path, endpoint, method in server.routes()
        for prefix in ("/v1", "")
    ]
    origins = server.settings.cors_origins
    anybody = {"allow_origin_regex": ".*"} if "*" in origins else {"allow_origins": origins}
    middleware = [
        Middleware(CORSMiddleware, **anybody, allow_methods=["*"], allow_headers=["*"]),
        Middleware(Keys, keys=server.settings.api_keys),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})
    app.router.redirect_slashes = False
    return app
