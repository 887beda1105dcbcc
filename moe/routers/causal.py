"""Which routers a model may have that continues a text."""

from ...errors import ConfigError
from .router import RouterConfig


def check_causal(router: RouterConfig) -> None:
    """Refuse to continue a text with a router whose choices depend on what a text does not have."""
    reason = router.why_not_among(("token_ids",)) or router.why_not_causal()
    if reason is not None:
        raise ConfigError(f"the model cannot continue a text: {reason}")
