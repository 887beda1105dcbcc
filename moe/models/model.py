"""What every kind of model is: layers of which some have experts. T tokens, D model width."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from ..batch import Batch
from ..blocks.block import State
from ..config.model import LayersConfig
from ..layer import MoELayer
from ..routers.draws import sequence_keys
from ..routers.router import Router
from ..routers.routing import Lookahead, Routing
from .options import WHOLE, ModelOptions
from .routed import LayerOutput, choose

B = TypeVar("B", bound=Batch)


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
    recompute: bool
    """Whether layers drop their activations in training and compute them again in backward."""

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

    def with_draw_keys(self, batch: B) -> B:
        """Return the batch, in training with a number for each sequence that routers draw from."""
        if self.training and any(router.config.draws() for router in self.routers()):
            return replace(batch, draw_keys=sequence_keys(batch.ids_T, batch.lengths))
        return batch

    def run_layer(self, layer: nn.Module, x_TD: Tensor, *more: Any) -> LayerOutput:
        """Run a layer, which may compute its activations again in backward.

        ``more`` is what this kind of layer reads besides its rows.

        Routings leave the recomputed region as outputs, so they are counted once.
        """
        output: LayerOutput
        if self.recompute and self.training:
            output = checkpoint(layer, x_TD, *more, use_reentrant=False)
        else:
            output = layer(x_TD, *more)
        return output

    def tie(self) -> None:
        """Make an output layer one with the embedding again, if the configuration says so."""


class WholeModel(Model):
    """A model that is not split into stages of layers."""

    def __init__(self, config: LayersConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__()
        whole = range(config.num_layers)
        assert options.stage in (None, whole), f"a model of kind {config.kind} has no stages"
        self.config, self.stage = config, whole
        self.recompute = options.recompute is True

    def run_layers(
        self,
        x_TD: Tensor,
        arguments_of: Callable[[int], tuple[Any, ...]],
        layers: range | None = None,
    ) -> ModelOutput:
        """Run neighbouring layers; None = all.

        Each gets the rows, what the block of the MoE layer before carries on, and the arguments of
        its index.
        """
        state: State = ()
        routings = []
        for index in self.stage if layers is None else layers:
            output = self.run_layer(self.layers[index], x_TD, state, *arguments_of(index))
            x_TD, state = output.x_TD, output.state
            if output.routing is not None:
                routings.append(output.routing)
        return ModelOutput(x_TD, routings)
