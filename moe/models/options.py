"""What a model is built with, in addition to its configuration."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from ...kernels.experts import Backend


class ModelOptions(NamedTuple):
    """What a model is built with, in addition to its configuration."""

    expert_ids: Sequence[int] | None = None
    """The experts this process holds; None = all."""
    backend: Backend = "auto"
    token_counts: Sequence[int] | None = None
    recompute: bool | Literal["experts"] = False
    """Drop activations in training and compute them again in backward (decoder.py)."""
    token_embeddings: Tensor | None = None
    """Those of another model, for routers that read them."""
    stage: range | None = None
    """The layers this process holds; None = all."""


WHOLE = ModelOptions()
"""All of a model in one process."""
