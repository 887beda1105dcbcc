"""Count refused requests by reason, wherever in the application they are refused."""

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.admission import Rejection
from ..proxy.places import REFUSED

REASONS: dict[int, Rejection] = {
    400: "bad_request",
    401: "no_key",
    404: "not_found",
    405: "not_found",
    408: "timed_out",
    413: "too_large",
    431: "too_large",
    500: "failed",
}
"""By HTTP status. What admission refuses (429, 503), it counts itself. What the proxy has refused
for a full server, it tells the next replica that it calls."""


class CountRefusals:
    """An application that counts the errors which ``app`` answers with."""

    def __init__(self, app: ASGIApp, rejected: Counter) -> None:
        self._app = app
        self._rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and look at the status of the answer."""
        if scope["type"] == "http":
            in_proxy = dict(scope["headers"]).get(REFUSED, b"")
            if in_proxy.isdigit():
                self._rejected.labels("queue_full").inc(int(in_proxy))

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in REASONS:
                self._rejected.labels(REASONS[message["status"]]).inc()
            await send(message)

        await self._app(scope, receive, watched)
