"""What a request is refused with, or failed with: an HTTP status and the object that clients of the API know."""

import logging
import re

from starlette.exceptions import HTTPException

from minillm.errors import MemoryLimit, MemoryShort, MinillmError, UsageError

log = logging.getLogger("minillm.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """status: of HTTP. type: None: that of TYPES. param: the field at fault. more: fields of the error object.
    retry_after: seconds."""

    def __init__(self, status, message, *, type=None, param=None, retry_after=None, **more):
        super().__init__(message)
        self.status, self.message, self.param, self.more = status, message, param, more
        self.type = type or TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.retry_after = retry_after

    @property
    def headers(self):
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def as_dict(self):
        about = {"message": self.message, "type": self.type, "code": self.status, "param": self.param}
        return {"error": about | self.more}


def bad(message, param=None):
    """The ApiError of a field that makes no sense."""
    return ApiError(400, message, param=param)


def of(error):
    """The ApiError of any exception. A bug's traceback goes to the log, and not to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # a form that is none
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, UsageError):
        return bad(str(error))
    if isinstance(error, MemoryLimit):
        more = {"needed_bytes": error.needed, "limit_bytes": error.limit}
        return ApiError(400, str(error), type="exceed_memory_error", **more)
    if isinstance(error, MemoryShort | MemoryError):
        return ApiError(503, f"out of memory: {error}", type="overloaded_error", retry_after=10)
    if isinstance(error, MinillmError):
        return ApiError(500, str(error))
    log.error("a bug in minillm", exc_info=error)
    words = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
    return ApiError(500, f"a bug in minillm, please report it: {words}")
