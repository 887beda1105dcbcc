"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024).

S slots, R rows and C columns of a matrix, F expert width, D model width.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.values.activation import fc1_parts
from ...parallel.mesh import Mesh
from .config import Beta, OptimizerConfig
from .held import Held
from .newton_schulz import orthogonalize
from .whole_matrices import WholeMatrices

RMS = 0.2
"""Root mean square of an update, about that of AdamW's (Liu et al. 2025, Moonlight)."""
MOST_NUMBERS = 1 << 27
"""Of experts, orthogonalised at a time: enough for large products, and half a GB in fp32."""


class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside layers, each expert's by itself; AdamW for everything else.

    AdamW updates embeddings, the head, norms, biases, routers and low-rank updates. Muon keeps one
    number of state for each weight, AdamW two. Updates are scaled like AdamW's, so its learning
    rate and weight decay can stay (Liu et al. 2025, arXiv 2502.16982).
    """

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    """How much of its running mean of the gradient Muon keeps each step."""
    nesterov: bool = True
    """Nesterov's momentum: the running mean looks a step ahead before it is made orthogonal."""
    newton_schulz_steps: int = Field(default=5, ge=1, le=20)
    """Steps that make a matrix orthogonal; each is three matrix products."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`AdamWConfig.identity`."""
        return {"kind": self.kind}


class Muon:
    """See :class:`~moeyard.training.optimizers.rule.UpdateRule`.

    ``M = lerp(M, G, 1 - momentum)``, ``U = lerp(G, M, momentum)`` (``M`` without ``nesterov``) and
    ``W = W (1 - lr decay) - lr 0.2 sqrt(max(R, C)) orthogonal(U)``. The gate's and the up half of
    fc1 are two matrices; without a gate it is one.

    An expert without rows in a step keeps its place, except for decay. Orthogonal updates are of
    full size however small the momentum is, so it would go on in its last direction for long.
    """

    def __init__(self, config: MuonConfig, mesh: Mesh) -> None:
        self._config = config
        self._matrices = WholeMatrices(mesh)

    def new_state(self, held: Held) -> dict[str, Tensor]:
        """Return the momentum."""
        return {"momentum": torch.zeros_like(held.master)}

    def steps_seen(self, held: Held, done: int) -> int:
        """Return all of them."""
        return done

    def update(self, parameters: Sequence[Held], lr: float, done: int) -> None:
        """Update experts where they are, and dense matrices each on one rank."""
        dense = [held for held in parameters if held.experts is None]
        updates = self._matrices.apply(
            self._orthogonal,
            (self._direction(held.gradient, held.state["momentum"]) for held in dense),
            (held.parameter for held in dense),
        )
        for held, update in zip(dense, updates, strict=True):
            self._add(held.master, update, lr, max(held.parameter.shape))
        for held in parameters:
            if held.experts is not None:
                self._update_experts(held, lr)

    def _update_experts(self, held: Held, lr: float) -> None:
        if not held.master.numel():
            return  # no slot is owned here
        assert held.experts is not None, "only experts have slots"
        halves = len(fc1_parts(held.experts.activation)) if held.leaf == "fc1" else 1
        slots = max(1, MOST_NUMBERS // held.master[0].numel())
        tensors = (held.master, held.gradient, held.state["momentum"])
        for parts in zip(*(tensor.split(slots) for tensor in tensors), strict=True):
            master, gradient, momentum = (part.unflatten(1, (halves, -1)) for part in parts)
            update = self._orthogonal(self._direction(gradient, momentum))
            has_rows = torch.linalg.vector_norm(gradient, torch.inf, (-2, -1), keepdim=True) > 0
            self._add(master, update * has_rows, lr, max(master.shape[-2:]))

    def _direction(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Update the momentum and return what is to be made orthogonal."""
        beta = self._config.momentum
        momentum.lerp_(gradient, 1 - beta)
        return gradient.lerp(momentum, beta) if self._config.nesterov else momentum.clone()

    def _orthogonal(self, direction: Tensor) -> Tensor:
        return orthogonalize(direction, self._config.newton_schulz_steps)

    def _add(self, master: Tensor, update: Tensor, lr: float, longest: int) -> None:
        master.mul_(1 - lr * self._config.weight_decay)
        master.add_(update, alpha=-lr * RMS * math.sqrt(longest))
