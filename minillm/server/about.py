"""Endpoints about the server itself: whether it goes on, what it serves, what it does now."""

import asyncio

from starlette.responses import Response

from minillm.sampling import SamplingParams
from minillm.server.errors import ApiError
from minillm.server.http import Json

STUCK = 60.0  # seconds without a step while there is work, after which the engine is thought to be stuck


class About:
    """Endpoints of a Server."""

    def __init__(self, server):
        self.server, self.llm, self.settings = server, server.llm, server.settings

    async def health(self, request):
        """Whether it takes requests."""
        if self.server.draining:
            raise self.server.places.closed
        return Json({"status": "ok"})

    async def livez(self, request):
        """Whether its engine goes on."""
        if self.llm.engine.stuck(STUCK):
            raise ApiError(503, f"the engine has made no step for {STUCK:.0f} seconds: restart the server")
        return Json({"status": "ok"})

    def _model(self):
        config = self.llm.config
        meta = {"n_ctx": self.llm.context, "n_ctx_train": config.context, "n_vocab": config.vocab_size}
        about = {"id": self.server.model_id, "object": "model", "created": self.server.created, "owned_by": "minillm"}
        return about | {"aliases": list(self.settings.aliases), "meta": meta | {"n_embd": config.dim}}

    async def models(self, request):
        return Json({"object": "list", "data": [self._model()]})

    async def model(self, request):
        name = request.path_params["name"]
        if name not in (self.server.model_id, *self.settings.aliases):
            raise ApiError(404, f"there is no model {name!r} here, but {self.server.model_id!r}", param="model")
        return Json(self._model())

    async def props(self, request):
        """What requests that say nothing are answered with."""
        tokenizer, params = self.llm.tokenizer, self.settings.params
        settings = {name: getattr(params, name) for name in SamplingParams.names()}
        template = tokenizer.vocabulary.chat_template if tokenizer else None
        return Json(
            {
                "default_generation_settings": {"n_ctx": self.llm.context, "params": settings},
                "total_slots": self.settings.parallel,
                "model_alias": self.server.model_id,
                "model_path": self.llm.config.name,
                "chat_template": template or "",
                "kv": self.llm.cache_config.as_dict(),
            }
        )

    async def slots(self, request):
        """The sequences that are read or answered now."""
        if not self.settings.slots:
            raise ApiError(501, "this server was started with --no-slots", type="not_supported_error")
        return Json(await asyncio.to_thread(self._slots))

    def _slots(self):
        found = []
        with self.llm.engine.alone():
            for i, request in enumerate(self.llm.engine.scheduler.requests):
                timings, cache = request.timings, request.cache
                slot = {"id": i, "n_ctx": self.llm.context, "is_processing": request.state != "waiting"}
                slot |= {"state": request.state, "read": request.share}
                slot |= {"n_prompt_tokens": timings.prompt_tokens, "n_cached_tokens": timings.cached_tokens}
                slot |= {"n_decoded": timings.generated_tokens, "kv_entries": cache.entries}
                found.append(slot | {"kv_bytes": cache.bytes_in_use, "kv_bytes_full": cache.full_bytes})
        return found

    async def metrics(self, request):
        if not self.settings.metrics:
            raise ApiError(501, "this server was started with --no-metrics", type="not_supported_error")
        text, media_type = await asyncio.to_thread(self.server.metrics.text)
        return Response(text, media_type=media_type)
