"""Files: texts that are uploaded once and named in questions. They are read as soon as there is a place."""

import asyncio
import codecs
import contextlib
import secrets
import time
from collections import OrderedDict

import numpy as np
from starlette.datastructures import UploadFile
from starlette.responses import Response

from minillm.server import prompt
from minillm.server.errors import ApiError, bad
from minillm.server.errors import of as error_of
from minillm.server.http import Json, limited
from minillm.server.messages import Message, Part
from minillm.server.snapshots import Prefix, boundaries, keys
from minillm.server.work import Work

MOST = 1000  # files


class File(Prefix):
    """A text, and its prefix of a chat that has no system message: what its reading leaves for questions."""

    def __init__(self, snapshots, name, text):
        super().__init__(snapshots, [], [], True)
        self.name, self.text, self.created = name, text, int(time.time())
        self.id = "file-" + secrets.token_hex(12)
        self.work = self.task = self.error = None
        self.read = {}  # of its cache once it was read

    def settled(self, cache):
        super().settled(cache)
        self.read = {"tokens": cache.seen, "bytes": cache.bytes_in_use, "full_bytes": cache.full_bytes}
        self.read |= {"kept": cache.kept}

    @property
    def state(self):
        if self.error or self.task.done():
            return "failed" if self.error else "ready"
        request = self.work and self.work.choices[0].request
        return "reading" if request and request.state == "reading" else "queued"

    def under_way(self):
        """What its cache holds while it is read. The engine goes on meanwhile: layers are those of one moment or so."""
        choice = self.work.choices[0]
        cache, request = choice.session.cache, choice.request
        about = {"lengths": cache.lengths.tolist(), "bytes": cache.bytes_in_use, "state": "reading"}
        about |= {"share": request.share, "n_tokens": self.ends[0]}
        return {"id": self.id, "object": "cache"} | about

    def as_dict(self):
        about = {"id": self.id, "object": "file", "bytes": len(self.text.encode()), "created_at": self.created}
        about |= {"filename": self.name, "purpose": "user_data", "status": "processed"}
        found = {"state": self.state} | self.read | ({"error": self.error} if self.error else {})
        return about | {"minillm": found}


class Files:
    """Endpoints of a Server."""

    def __init__(self, server):
        self.server, self.llm, self.files = server, server.llm, OrderedDict()

    def text(self, file_id):
        """The text of a file, or None."""
        file = self.files.get(file_id)
        return file and file.text

    def _named(self, request):
        name = request.path_params["id"]
        if name not in self.files:
            raise ApiError(404, f"there is no file {name!r} here: it was deleted, or the server has been restarted")
        return self.files[name]

    async def upload(self, request):
        """multipart/form-data with `file`, a text in UTF-8, and `purpose`."""
        async with limited(request, self.server.settings.max_body).form(max_files=1, max_fields=10) as form:
            given, purpose = form.get("file"), form.get("purpose")
            if not isinstance(given, UploadFile):
                raise bad("file must be a file of multipart/form-data", "file")
            if purpose not in ("user_data", "assistants"):
                raise bad(f"purpose must be user_data, not {purpose!r}", "purpose")
            name, data = given.filename, await given.read()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise bad(f"{name} is no UTF-8 text at byte {error.start}: convert it", "file") from None
        if not text.strip():
            raise bad(f"{name} holds no text", "file")
        if len(self.files) >= MOST:
            raise ApiError(507, f"there are {MOST} files already: delete some")
        file = File(self.server.snapshots, name, text)
        await asyncio.to_thread(self._prepare, file)
        file.task = asyncio.ensure_future(self._read(file))
        self.files[file.id] = file
        return Json(file.as_dict())

    def _prepare(self, file):
        """The Work that reads a file, up to the token after its end. Raises ApiError where it is too long."""
        compressor = self.llm.compressor
        whole = prompt.of_chat(self.llm, [Message("user", [Part(file.text, breaks=True), Part("?")])])
        ends = boundaries(whole, compressor, True)[:1]
        if ends:  # else it is too short to be a prefix
            file.ends, file.keys = ends, keys(self.llm, compressor, whole.ids, ends, "")
            begin = prompt.Prompt(whole.ids[: ends[0] + 1], prefix=file)
            file.work = Work(self.llm, compressor, [begin], (None,))

    async def _read(self, file):
        """Read a file as soon as there is a place. What goes wrong is told of it: questions read it themselves."""
        if file.work is None:
            return
        try:
            place = self.server.places.ask()
        except ApiError as error:
            file.error = error.message
            return
        try:
            await file.work.open()
            await asyncio.wait({place})
            place.result()
            async with contextlib.aclosing(file.work.pieces()) as pieces:
                async for _ in pieces:
                    pass
        except Exception as error:
            file.error = error_of(error).message
        finally:
            try:
                await file.work.leave()
            finally:
                self.server.places.leave(place)

    async def list(self, request):
        found = [file.as_dict() for file in self.files.values()]
        return Json({"object": "list", "data": found, "has_more": False})

    async def get(self, request):
        return Json(self._named(request).as_dict())

    async def content(self, request):
        return Response(self._named(request).text, media_type="text/plain; charset=utf-8")

    async def delete(self, request):
        """Its snapshot goes, too."""
        file = self._named(request)
        del self.files[file.id]
        file.task.cancel()
        await asyncio.gather(file.task, return_exceptions=True)
        await asyncio.to_thread(self._forget, file)
        return Json({"id": file.id, "object": "file", "deleted": True})

    def _forget(self, file):
        with self.llm.engine.alone():
            for key in file.keys:
                self.server.snapshots.forget(key)

    async def cache(self, request):
        """What is left of each token of a file that was read."""
        return Json(await asyncio.to_thread(self._cache, self._named(request)))

    def _cache(self, file):
        if file.state == "reading":
            return file.under_way()
        with self.llm.engine.alone():
            cache = self.server.snapshots.find(file.keys)
            if cache is None:
                raise ApiError(404, f"no cache of {file.id} is in memory now: wait until it is read, or ask about it")
            shares, ids = kept(cache), list(cache.token_ids)
            about = {"lengths": cache.lengths.tolist(), "bytes": cache.bytes_in_use, "full_bytes": cache.full_bytes}
        config = self.llm.cache_config.as_dict()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character is with the last of its tokens
        texts = [decoder.decode(self.llm.tokenizer.token_bytes(one)) for one in ids]
        about |= {"method": config["method"], "budget": config["budget"], "state": "ready", "share": 1.0}
        about |= {"n_tokens": len(ids)}
        return {"id": file.id, "object": "cache", "tokens": texts, "kept": shares.tolist()} | about

    async def stop(self):
        """End the readings that are on the way."""
        for file in self.files.values():
            file.task.cancel()
        await asyncio.gather(*(file.task for file in self.files.values()), return_exceptions=True)


def kept(cache):
    """(tokens,) of each token that was read the share of (layer, head) pairs that hold an entry at its position. An
    entry that others were merged into counts at its own."""
    found = np.zeros(cache.seen)
    for layer in range(len(cache.lengths)):
        entries = cache.read(layer)
        heads = np.split(np.asarray(cache.pool.ops.host(entries.pos)), np.cumsum(entries.lengths)[:-1])
        for pos in heads:
            found[np.unique(pos)] += 1
    return found / cache.lengths.size
