"""The balance loss in ``config.json``, to and from our router's configuration.

transformers pools counts and probabilities of all MoE layers before it multiplies them, and its
loss is K at perfect balance where ours is 1. It adds the loss only where ``output_router_logits``
is true. We never write true, because its generate (5.23) then fails for a batch with a mask.
"""

from typing import Any

from ....errors import ModelFileError
from ...config.model import ModelConfig
from .keys import Values, topk_moe

OWN_KEY = "moeyard_balance_loss"
"""The loss of a run, for the next run that starts from its export; transformers ignores it.

It counts if ``output_router_logits`` is not true.
"""


def read_balance_loss(values: Values, k: int) -> dict[str, Any]:
    """Return the fields of a ``topk`` router for the loss that training would add."""
    own = values.get(OWN_KEY)
    if not isinstance(own, dict | None):
        raise ModelFileError(f"config.json has {OWN_KEY} = {own!r}; use an object or leave it out.")
    if values["output_router_logits"]:
        return {"balance_loss": values["router_aux_loss_coef"] * k, "balance_over": "model"}
    if own:
        return {"balance_loss": own["coefficient"], "balance_over": own["over"]}
    return {"balance_loss": 0.0, "balance_over": "model"}


def write_balance_loss(config: ModelConfig) -> Values:
    """Return the keys that :func:`read_balance_loss` reads.

    A loss that is summed over layers is written as the pooled loss that equals it if all layers
    have the same counts.
    """
    _, router = topk_moe(config)
    if not router.balance_loss:
        return {"output_router_logits": False}
    layers = len(config.moe_layers) if router.balance_over == "layer" else 1
    coefficient = router.balance_loss * layers / router.k
    return {
        "router_aux_loss_coef": float(f"{coefficient:.12g}"),  # a round trip returns what it read
        OWN_KEY: {"coefficient": router.balance_loss, "over": router.balance_over},
    }
