"""The Ray Serve application: ``serve run moeyard.serving.app:build model=MODEL_DIR``."""

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from .server import ServeArgs, Server, check_model


@serve.deployment(
    name="moeyard",
    ray_actor_options={"num_cpus": 1},
    # Waiting happens in the engine's queue, which knows what it can batch.
    max_ongoing_requests=512,
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=20,
)
@serve.ingress()
class MoeyardServer:
    """One replica: a model, its engine, its HTTP application."""

    def __init__(self, args: ServeArgs) -> None:
        self._server = Server(args)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._server.app

    def check_health(self) -> None:
        """Tell Ray to restart this replica when the engine does not work."""
        problem = self._server.thread.problem()
        if problem is not None:
            raise RuntimeError(problem)

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.close()


def build(args: ServeArgs) -> Application:
    """Build the application from typed arguments (Ray fills them from the CLI or from YAML).

    What cannot be served is refused here, before a replica starts.
    """
    check_model(args)
    return MoeyardServer.bind(args)  # type: ignore[attr-defined]
