"""Checks before the application: the size of the headers, and the API key."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import RequestError
from .responses import error_response

MAX_HEADER_BYTES = 32 << 10
"""Names and values of all headers together; a key and a browser's cookies take far less."""
OPEN_PATHS = frozenset({"/health"})
"""Answered without a key; everything else, known or unknown, needs one."""


class Gate:
    """Refuse a request by its headers, before its body is read.

    With a key, every path except the open ones needs ``Authorization: Bearer KEY``.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass permitted requests on and answer the others with an error."""
        error = None if scope["type"] == "lifespan" else self._problem(scope)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _problem(self, scope: Scope) -> RequestError | None:
        headers = scope.get("headers", ())
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if num_bytes > MAX_HEADER_BYTES:
            return RequestError(
                f"the headers have {num_bytes} bytes and may have {MAX_HEADER_BYTES}; send fewer.",
                status=431,
            )
        # Behind a route prefix the path begins with it.
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if self._expected is None or (scope["type"] == "http" and path in OPEN_PATHS):
            return None
        given = dict(headers).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            return None
        return RequestError(
            "the API key is missing or wrong; send Authorization: Bearer KEY.",
            code="invalid_api_key",
            status=401,
        )
