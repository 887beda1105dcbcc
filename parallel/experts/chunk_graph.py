"""The experts' work on one chunk of rows, as autograd keeps it.

N rows, K choices, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChunkGraph:
    """Leaves and the result of a chunk."""

    x_ND: Tensor
    weights_NK: Tensor
    y_ND: Tensor

    def backward(self, grad_ND: Tensor) -> list[Tensor]:
        """Return the gradients of rows and weights; those of experts are added to theirs."""
        torch.autograd.backward(self.y_ND, grad_ND)
        found = []
        for leaf in (self.x_ND, self.weights_NK):
            found.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            leaf.grad = None
        return found
