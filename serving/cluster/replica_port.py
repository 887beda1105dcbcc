"""Close the port that each replica of Ray Serve opens to every host.

A replica listens for calls of other deployments by gRPC. It does so on every interface, asks for
no token and unpickles what it is sent, so a caller who reaches the port runs code as the server's
user. Ray uses the port only where ``RAY_SERVE_USE_GRPC_BY_DEFAULT`` is on, and has no switch to
leave it out.
"""

import logging
import os
from typing import Any

from grpc.aio import _server

log = logging.getLogger(__name__)

RAYS_ADDRESS = "[::]:0"
"""A random port on every interface; nothing else in a replica asks for that."""
VARIABLES = ("RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_PROXY_USE_GRPC")


def close_replica_port() -> None:
    """Keep Ray's gRPC server in this process from listening, unless Ray needs it."""
    if any(os.environ.get(name) == "1" for name in VARIABLES):
        log.warning(
            "%s makes every replica unpickle what any host on the network sends; leave it off "
            "unless a firewall closes all ports of this machine.",
            " or ".join(VARIABLES),
        )
        return
    listen = _server.Server.add_insecure_port

    def add_insecure_port(server: Any, address: str) -> int:
        return 0 if address == RAYS_ADDRESS else listen(server, address)

    _server.Server.add_insecure_port = add_insecure_port
