"""Main gradients where each rank has parts of the dense parameters, for engines that split them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import Mesh
from .gradients import MainGradients, square_sum


class PartMainGradients(MainGradients):
    """Main gradients of this rank's parts, and those of routers and experts.

    ``dense`` lists the parameters held whole and reduced here: routers. ``parts`` lists those that
    another code sums. Each of them gets its ``main_grad`` from there.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, parts: Sequence[nn.Parameter]) -> None:
        super().__init__(model, mesh, elsewhere=parts)
        self.parts = list(parts)
        self._like = next(p for p in model.parameters() if p.requires_grad)

    def reduce(self) -> None:
        """Sum routers over all ranks and experts over the ranks that hold the same ones."""
        super().reduce()
        if not self.sums_dense and self._dense_flat.numel():
            dist.all_reduce(self._dense_flat, group=self._mesh.dp_group)

    def norm(self) -> Tensor:
        """Return the global 2-norm, each distinct parameter counted once, as an fp64 scalar."""
        return torch.hypot(super().norm(), self.square_sum_of_parts().sqrt())

    def square_sum_of_parts(self) -> Tensor:
        """Return the sum of squares of all ranks' parts; all ranks call this."""
        squares = self.square_sum_here()
        dist.all_reduce(squares, group=self._mesh.dp_group)
        return squares

    def square_sum_here(self) -> Tensor:
        """Return the sum of squares of this rank's parts."""
        return square_sum(self.parts, self._like)


class ZeroMainGradients(PartMainGradients):
    """Main gradients of what DeepSpeed hands over."""

    def __init__(
        self, model: nn.Module, mesh: Mesh, held: Sequence[nn.Parameter], is_split: bool
    ) -> None:
        super().__init__(model, mesh, held)
        self._is_split = is_split

    def square_sum_of_parts(self) -> Tensor:
        """Return the sum of squares over all parameters that DeepSpeed has."""
        return super().square_sum_of_parts() if self._is_split else self.square_sum_here()

    def scale_(self, factor: Tensor) -> None:
        """Multiply all main gradients by ``factor``."""
        super().scale_(factor)
        for parameter in self.parts:
            main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            main_grad.mul_(factor.to(main_grad.device))
