"""Which routers a model may have that continues a text."""

from ...errors import ConfigError
from .router import RouterConfig
from .row_facts import RowFact

OF_TEXT: tuple[RowFact, ...] = ("token_ids",)
"""What a text says of each row."""


def check_causal(router: RouterConfig) -> None:
    """Refuse to continue a text with a router whose choices depend on what a text does not have."""
    reason = router.why_not_among(OF_TEXT) or router.why_not_causal()
    if reason is not None:
        raise ConfigError(f"the model cannot continue a text: {reason}")
