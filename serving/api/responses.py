"""Errors and events as OpenAI's clients expect them. Imports nothing heavy: Ray's proxy uses it."""

import json
from typing import Any

from starlette.responses import JSONResponse

from ...errors import RequestError

DONE = b"data: [DONE]\n\n"
RETRY_AFTER_S = 1
"""Default of ``Retry-After``: a read, a step or a replica may fail for a moment."""


def sse(values: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return f"data: {json.dumps(values)}\n\n".encode()


def error_object(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def error_response(error: RequestError) -> JSONResponse:
    """Return the response that tells a client of ``error``."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the request may still come
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status in (429, 503):
        retry_after_s = RETRY_AFTER_S
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return JSONResponse(error_object(error), status_code=error.status, headers=headers)
