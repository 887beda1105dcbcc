"""The interface of dense engines: who holds, reduces and steps a run's dense parameters.

Dense means everything except the routed experts. Experts have the same paths and gradients under
every engine. A run calls ``place``, sets the precision, then calls ``wrap``. Each step then calls
``gradients.zero``, ``backward`` for every micro-batch, ``gradients.reduce`` and ``step``. Callers
never ask which kind they have; table.py lists the kinds.
"""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from .gradient_queue import GradientQueue
from .gradients import MainGradients

Clip = Callable[[Tensor], Tensor]
"""Gets the norm of all gradients and returns by what to multiply them, the same on all ranks. May
raise, also the same on all ranks; then nothing is updated."""


class Optimizer(Protocol):
    """What updates parameters from their ``main_grad``."""

    def step(self, lr: float) -> None:
        """Update all parameters."""


class DenseEngine(Protocol):
    """One kind of engine, made for one model of one run."""

    gradients: MainGradients
    """Sums of this rank's part of every trained parameter, set by ``wrap``, complete in ``step``.
    Their norm counts each distinct parameter of the whole model once and is the same on all ranks.
    """

    queue: GradientQueue | None
    """Where dense gradients wait until they are sent, set by ``wrap``; None if they do not."""

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move the parameters that each rank holds whole to ``device``; ``wrap`` moves the rest."""

    def own_masters(self, model: nn.Module) -> Set[str]:
        """Return the names of the parameters that stay fp32 under bf16 and need no other master."""

    def wrap(
        self, objective: nn.Module, model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """Return the module whose forward a step calls, and attach ``gradients``.

        ``objective`` is the module whose forward runs the whole of ``model``. Forward and backward
        see parameters in ``dtype``. ``model`` still has unsharded parameters, with the same values
        on all ranks. ``objective`` itself remains callable, for evaluation.
        """

    def accumulating(self) -> AbstractContextManager[object]:
        """Return a context whose backward passes reduce nothing between ranks."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss to ``gradients``.

        Outside ``accumulating`` this may start the reduction, which ``gradients.reduce`` completes.
        """

    def step(self, optimizer: Optimizer, lr: float, clip: Clip) -> None:
        """Clip all gradients, then update all parameters once, dense ones and experts.

        ``lr`` is the learning rate.
        """
