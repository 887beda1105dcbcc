"""What every kind of model is: layers of which some have experts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..batch import Batch
from ..config.model import LayersConfig
from ..layer import MoELayer
from ..routers.router import Router
from ..routers.routing import Lookahead, Routing
from .routed import choose


@dataclass(slots=True)
class ModelOutput:
    """The result of a forward."""

    hidden_TD: Tensor
    """Rows after the last layer."""
    routings: list[Routing] = field(default_factory=list)
    """One per layer of :meth:`Model.routed_layers`, in order."""


class Model(nn.Module):
    """The base of models. Training, folders and the expert store ask for no more than this.

    Its forward takes a :class:`.Batch` and returns a :class:`ModelOutput`. Each of ``layers`` may
    have an :class:`MoELayer` as its ``mlp``.
    """

    config: LayersConfig
    stage: range
    """The neighbouring layers that this process holds."""
    layers: nn.ModuleList

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.parameters()).device

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """Return (layer index, MoE layer) of every MoE layer that this process holds."""
        found = [(index, getattr(layer, "mlp", None)) for index, layer in enumerate(self.layers)]
        return [(index, mlp) for index, mlp in found if isinstance(mlp, MoELayer)]

    def routed_layers(self) -> list[tuple[int, Router]]:
        """Return (layer index, router) of every layer here that routes its tokens."""
        return [(index, layer.gate) for index, layer in self.moe_layers()]

    def routers(self) -> list[Router]:
        """Return the routers, in the order of :meth:`routed_layers`."""
        return [router for _, router in self.routed_layers()]

    def before_forwards(self, hook: Callable[[Batch], None]) -> RemovableHandle:
        """Call ``hook`` with the rows of each forward before it runs."""
        return self.register_forward_pre_hook(lambda _, arguments: hook(arguments[0]))

    def initial_std(self, name: str) -> float | None:
        """Return the std of a matrix's first values; None = what ``initialize`` gives it."""
        return None

    def route_from_tokens(self, batch: Batch, layers: range | None = None) -> dict[int, Routing]:
        """Return, by layer, the choices that token ids alone decide, and announce them.

        ``layers`` are those that compute these rows; None = all.
        """
        early = {}
        for index, layer in self.moe_layers():
            if layer.lookahead is Lookahead.TOKEN and (layers is None or index in layers):
                early[index] = choose(index, layer, None, batch)
                layer.experts.announce(early[index])
        return early

    def tie(self) -> None:
        """Make an output layer one with the embedding again, if the configuration says so."""
