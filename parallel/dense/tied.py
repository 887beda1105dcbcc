"""Tied embeddings where the first and the last stage both hold them: one parameter in two places.

The first stage reads tokens with it, and the last one scores them. Both start with the same
values, and each has a part of the gradient. Both parts are summed, so both take the same step.
"""

import torch.distributed as dist
from torch import Tensor, nn

from ...moe.models.decoder import Decoder
from ..mesh import Mesh
from ..watch.pulse import pulse


class TiedEmbedding:
    """This rank's copy of an embedding that another stage has too."""

    def __init__(self, parameter: Tensor, group: dist.ProcessGroup, counts: bool) -> None:
        self.parameter = parameter
        self.counts = counts
        """Whether the norm of gradients counts it here; true in one of the two stages."""
        self._group = group

    @classmethod
    def of(cls, model: nn.Module, mesh: Mesh) -> "TiedEmbedding | None":
        """Return it, or None if the model's embeddings are not tied or no other stage has them."""
        if mesh.ends_group is None or not isinstance(model, Decoder):
            return None
        if not model.config.tie_embeddings:
            return None
        return cls(model.embed_tokens.weight, mesh.ends_group, counts=mesh.pp_rank == 0)

    @pulse.in_collective("the sum of the tied embedding's gradients")
    def sum(self) -> None:
        """Sum the gradients of both stages; each has summed over its own ranks before."""
        dist.all_reduce(self.parameter.main_grad, group=self._group)  # type: ignore[attr-defined]
