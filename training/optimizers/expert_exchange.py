"""The exchange of weights between experts after each step, for routers that average them."""

from collections.abc import Sequence

from torch import nn

from ...moe.exchange import exchange
from ...moe.layer import MoELayer
from .held import Held


class ExpertExchange:
    """The masters of experts that exchange weights, on one rank; see moe/exchange.py."""

    def __init__(self, model: nn.Module, trained: Sequence[Held]) -> None:
        layers = [m for m in model.modules() if isinstance(m, MoELayer) and m.average is not None]
        layer_of = {id(layer.experts): layer for layer in layers}
        self._parts = [
            (layer_of[id(held.experts)], held) for held in trained if id(held.experts) in layer_of
        ]

    def run(self, done: int) -> None:
        """Exchange after the update of step ``done`` - 1; all ranks call it."""
        for layer, held in self._parts:
            exchange(layer, held.leaf, held.master, done)
