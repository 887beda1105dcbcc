"""The Ray Serve application: ``serve run moeyard.serving.app:build model=MODEL_DIR``."""

import logging
import os
from typing import Any

from click import ClickException
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from ..configuration import validate_config
from ..errors import MoeyardError
from ..settled import settle, trim_now_and_then
from .cluster.replica_port import close_replica_port
from .hosting import check_model, open_server
from .proxy_guard import CALLBACK, CALLBACK_VARIABLE, ask_for_guard
from .replicas.hub_link import HubLink
from .replicas.places_router import CROWD, ORIGINS, PLACES, places_routing
from .replicas.scaling import ANSWERS, scaling
from .serve_args import ServeArgs
from .server import with_commit
from .server_budgets import with_budgets

log = logging.getLogger(__name__)

SPARE_REQUESTS = 64
"""Extra requests that a replica may take: health, metrics and refusals."""
MAX_QUEUED_IN_PROXY = 1024
"""Most requests that wait in Ray's proxy for a replica to take them or to start; more get 503. Each
holds a body of at most 1 MiB."""

ask_for_guard()  # ``serve run`` imports this file before it starts Ray


class Refused(RayServeException, ClickException):
    """An application that cannot be built, as one sentence.

    Ray shows a RayServeException as it is in ``serve status``; its command line does the same
    with a ClickException. Anything else would arrive with a traceback.
    """


@serve.deployment(
    name="moeyard",
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=1,  # what a death costs before anything is done about it
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
)
@serve.ingress()
class MoeyardServer:
    """One replica: a model, its engine, its HTTP application."""

    def __init__(self, args: ServeArgs) -> None:
        if not os.environ.get(CALLBACK_VARIABLE):
            log.warning(
                "streams of a replica that dies will end without an error event; "
                "start Ray with %s=%s.",
                CALLBACK_VARIABLE,
                CALLBACK,
            )
        close_replica_port()
        self._args = args
        context = serve.get_replica_context()
        replica = context.replica_id.unique_id
        self._server = open_server(args, replica)
        self._link = HubLink(context.app_name, replica, self._server)
        self._app = self._server.app(self._link.render)
        settle()
        trim_now_and_then()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def check_health(self) -> None:
        """Tell Ray to restart this replica when the engine does not work."""
        problem = self._server.thread.problem()
        if problem is not None and not self._server.admission.is_draining:
            raise RuntimeError(problem)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray's controller what ``replicas/scaling.py`` decides by."""
        return {ANSWERS: self._server.admission.num_held}

    def record_replica_metadata(self) -> dict[str, Any]:
        """Tell Ray's router in each proxy, once, what requests this replica takes."""
        return places_metadata(self._args, self._server.admission.num_places)

    def __del__(self) -> None:
        if hasattr(self, "_link"):
            self._link.close()
        if hasattr(self, "_server"):
            self._server.close()


def places_metadata(args: ServeArgs, num_places: int) -> dict[str, Any]:
    """Return what a replica with so many places says of itself to the routers in all proxies."""
    # One that has half a batch more than another one is passed over: its answers would be slower
    # by more than most beginnings save.
    crowd = max(1, args.max_num_seqs // 2) if args.prefix_routing else None
    return {PLACES: num_places, CROWD: crowd, ORIGINS: args.cors_origin}


def build(args: dict[str, Any]) -> Application:
    """Build the application from the arguments of Ray's command line or YAML.

    Without ``api_key`` the key is ``$MOEYARD_API_KEY``, which ``serve config`` does not show. What
    cannot be served is refused here, before a replica starts.
    """
    args = {"api_key": os.environ.get("MOEYARD_API_KEY")} | args
    try:
        return application(validate_config(ServeArgs, args))
    except MoeyardError as error:
        raise Refused(str(error)) from None


def application(args: ServeArgs) -> Application:
    """Return the application of checked arguments; raises :class:`MoeyardError`."""
    args, _ = with_budgets(with_commit(args))
    check_model(args)
    options: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        options = {"autoscaling_config": scaling(args)}
    return MoeyardServer.options(  # type: ignore[attr-defined]
        **options,
        request_router_config=places_routing(),
        # Waiting happens in the engine's queue, which knows what it can batch.
        max_ongoing_requests=args.max_num_seqs + args.max_queued_requests + SPARE_REQUESTS,
        max_queued_requests=MAX_QUEUED_IN_PROXY,
        # Ray asks a replica that it removes to finish, and kills it after this time.
        graceful_shutdown_timeout_s=args.drain_timeout,
    ).bind(args)
