"""Read a request's body, with limits on its bytes and seconds."""

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from ...errors import RequestError

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
"""For a whole body: 1 MiB at 35 kB/s."""


async def read_body(receive: Receive) -> bytes:
    """Return the body.

    Raises :class:`RequestError`: 413 beyond :data:`MAX_BODY_BYTES`, 408 if the body is not complete
    after :data:`BODY_TIMEOUT_S`. Raises ``ClientDisconnect`` if the client leaves.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            is_whole = False
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise RequestError(
                        f"the body is larger than {MAX_BODY_BYTES} bytes; send a shorter prompt.",
                        status=413,
                    )
                is_whole = not message.get("more_body", False)
    except TimeoutError:
        raise late_request(f"of the body, {len(body)} bytes") from None
    return bytes(body)


def late_request(what_came: str) -> RequestError:
    """Return the error for a request that has not come whole in time."""
    return RequestError(
        f"the request did not come whole within {BODY_TIMEOUT_S:g} s ({what_came} came); "
        "send it again, in one piece.",
        code="request_timeout",
        status=408,
    )
