"""Build the router of a layer."""

from ...errors import ConfigError
from .router import Router, RouterConfig, RouterSizes


def build_router(config: RouterConfig, sizes: RouterSizes, activation: str) -> Router:
    """Return the module of ``config``, for experts with ``activation``.

    Raises :class:`ConfigError` for what does not fit, and for classes that are no routers.
    """
    if not isinstance(config, RouterConfig):
        raise ConfigError(
            f"router is {config!r}; give the configuration of a router, such as moeyard.TopK(k=4)."
        )
    problem = config.problem_with_activation(activation)
    if problem is not None:
        raise ConfigError(problem)
    router = config.build(sizes)
    if not isinstance(router, Router):
        raise ConfigError(
            f"router is {type(config).__name__}, whose build returned a {type(router).__name__}; "
            "return a moeyard.Router."
        )
    return router
