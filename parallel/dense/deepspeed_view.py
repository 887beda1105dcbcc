"""What DeepSpeed sees of a run: a model without experts and routers, and an optimizer to call.

DeepSpeed partitions, broadcasts and reduces every parameter of the module that it gets. So it gets
a tree with the same dense modules, in which the others are missing. A forward of the tree runs the
real model.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn


class DenseView(nn.Module):
    """``objective`` as DeepSpeed sees it, without the modules ``hidden``."""

    def __init__(self, objective: nn.Module, hidden: Collection[nn.Module]) -> None:
        super().__init__()
        self._objective = (objective,)  # in a tuple it is no submodule
        self._batch: Any = None
        self._result: Any = None
        self.visible = _without(objective, set(hidden))

    def forward(self) -> Tensor:
        """Run the objective on the batch; DeepSpeed's hooks want a tensor, so return the loss."""
        self._result = self._objective[0](self._batch)
        loss_sum: Tensor = self._result.loss_sum
        return loss_sum

    def through(self, engine: nn.Module, batch: Any) -> Any:
        """Return the objective's result for ``batch``, whose loss has gone through ``engine``."""
        self._batch = batch
        loss_sum = engine()
        result, self._batch, self._result = self._result, None, None
        return replace(result, loss_sum=loss_sum)


def _without(module: nn.Module, hidden: Collection[nn.Module]) -> nn.Module:
    """Return ``module``, or where it contains a hidden one, a tree of the others."""
    if not any(inner in hidden for inner in module.modules()):
        return module
    assert not list(module.parameters(recurse=False)), "the tree would lose parameters"
    tree = nn.Module()
    for name, child in module.named_children():
        if child not in hidden:
            tree.add_module(name, _without(child, hidden))
    return tree


class ThroughDeepSpeed(nn.Module):
    """What a step calls: a batch goes through DeepSpeed's engine, and a result comes back."""

    def __init__(self, engine: nn.Module, view: DenseView) -> None:
        super().__init__()
        self._parts = (engine, view)  # in a tuple they are no submodules

    def forward(self, batch: Any) -> Any:
        """Return the objective's result."""
        engine, view = self._parts
        return view.through(engine, batch)


Receiver = Callable[[Sequence[Tensor]], None]


class HandOver(torch.optim.Optimizer):
    """Stands where DeepSpeed expects an optimizer, and hands over what it would update.

    DeepSpeed puts flat fp32 tensors with their gradients in the place of the parameters given here,
    calls :meth:`step`, and takes the values that it then finds in them for new weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._receiver: Receiver | None = None

    def given(self) -> list[Tensor]:
        """Return the tensors to update."""
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def next_to(self, receiver: Receiver) -> None:
        """Let ``receiver`` do the next update."""
        self._receiver = receiver

    @property
    def is_waiting(self) -> bool:
        """Whether the update has not been asked for."""
        return self._receiver is not None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Hand over, once for each time that a receiver was named."""
        assert self._receiver is not None, "DeepSpeed asks for two updates in a step"
        receiver, self._receiver = self._receiver, None
        receiver(self.given())
