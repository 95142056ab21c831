"""Bodies in and out, who may ask, and what becomes of exceptions."""

import hmac
import json

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from minillm.server import errors
from minillm.server.errors import ApiError, bad
from minillm.server.page import FILES

PUBLIC = ("/health", "/livez", "/models", *FILES)  # answered without a key


class Json(Response):
    """A value as JSON in UTF-8. What is no Unicode (half a surrogate pair that a client sent) becomes "?"."""

    media_type = "application/json"

    def render(self, content):
        return encoded(content)


def encoded(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def error_response(error):
    """The Response of any exception."""
    error = errors.of(error)
    return Json(error.as_dict(), error.status, error.headers)


def guarded(endpoint):
    """An endpoint whose exceptions become error objects."""

    async def answer(request):
        try:
            return await endpoint(request)
        except ClientDisconnect:  # while its body was read: there is nobody to answer
            return Response(status_code=499)
        except Exception as error:
            return error_response(error)

    return answer


async def http_error(request, error):
    """Of the router: no such route, or not with this method."""
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return error_response(ApiError(404, f"there is no {path} here: see docs/server.md for the routes"))
    if error.status_code == 405:
        response = error_response(ApiError(405, f"{path} does not take {method}"))
        response.headers.update(error.headers or {})
        return response
    return error_response(ApiError(error.status_code, str(error.detail)))


def limited(request, limit):
    """The same Request; reading its body raises ApiError where that has more than `limit` bytes."""
    too_large = ApiError(413, f"the request has more than {limit} bytes: shorten it, or raise --max-body")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    seen = 0

    async def receive():
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise too_large
        return message

    return Request(request.scope, receive)


async def json_body(request, limit):
    """The JSON object of a request of at most `limit` bytes. Raises ApiError."""
    data = await limited(request, limit).body()
    try:
        body = json.loads(data)
    except RecursionError:
        raise bad("the request's JSON is nested too deeply") from None
    except ValueError as error:  # of JSON, or of UTF-8
        raise bad(f"the request is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad("the request is no JSON object: write {...}")
    return body


class Keys:
    """ASGI middleware: who has none of the keys is answered with 401, but on PUBLIC routes."""

    def __init__(self, app, keys):
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not self.keys or self._known(scope):
            await self.app(scope, receive, send)
            return
        message = "this server needs an API key: send it as Authorization: Bearer KEY, or as X-Api-Key: KEY"
        await error_response(ApiError(401, message))(scope, receive, send)

    def _known(self, scope):
        if scope["path"].removeprefix("/v1") in PUBLIC:
            return True
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [token.strip()] if scheme.lower() == b"bearer" else []
        given.append(headers.get(b"x-api-key", b""))
        return any(hmac.compare_digest(one, key) for one in given for key in self.keys)
