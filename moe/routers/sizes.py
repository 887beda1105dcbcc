"""What a router must know about the model around it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RouterSizes:
    """What a router must know about the model around it."""

    d_model: int
    num_experts: int
    vocab_size: int | None = None
    """Vocabulary size; None if a layer is built alone."""
    token_counts: Sequence[int] | None = None
    """How often each token id occurs in the training data. None outside training, and for routers
    without :attr:`RouterConfig.needs_token_counts`."""
    layer: int = 0
    """Number of the layer in its model."""
    token_embeddings: Tensor | None = None
    """``[V, width]``: another model's token embeddings, for routers with
    :meth:`RouterConfig.embeddings_folder`. None outside training."""
    expert_bias: bool = False
    """Whether the experts' projections have biases."""
