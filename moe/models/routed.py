"""What layers with experts share, whatever the model: how they are built, and how they choose.

T tokens, D model width.
"""

from typing import NamedTuple

from torch import Tensor

from ..batch import Batch
from ..blocks.block import State
from ..config.model import LayersConfig
from ..layer import MoELayer
from ..routers.routing import RouterInput, Routing
from .options import ModelOptions


class LayerOutput(NamedTuple):
    """The result of a layer's forward."""

    x_TD: Tensor
    """The residual stream after the layer."""
    state: State
    """What the block carries to the next MoE layer."""
    routing: Routing | None = None
    """The layer's choice, of experts or of LoRA experts; None if it has none."""
    next_routing: Routing | None = None
    """The choice of the next MoE layer, if its router reads what this one's experts read."""
    mlp_input_TD: Tensor | None = None
    """What the experts read, if the caller asks for it."""


def build_moe(config: LayersConfig, layer: int, options: ModelOptions) -> MoELayer:
    """Return the MoE layer at index ``layer``; the configuration has experts there."""
    moe = config.moe
    assert moe is not None and config.is_moe(layer), "a dense layer"
    return MoELayer(
        config.d_model,
        moe.d_expert,
        moe.num_experts,
        config.router(layer),
        moe.activation,
        moe.d_shared,
        shared_gate=moe.shared_gate,
        expert_bias=moe.expert_bias,
        vocab_size=config.vocab_size,
        layer=layer,
        token_counts=options.token_counts,
        expert_ids=options.expert_ids,
        backend=options.backend,
        recompute=options.recompute == "experts",
        token_embeddings=options.token_embeddings,
    )


def choose(index: int, layer: MoELayer, x_TD: Tensor | None, batch: Batch) -> Routing:
    """Return the choice of layer ``index``, or replay the one that the batch has for it."""
    found = router_input(x_TD, batch)
    if batch.routes is None:
        return layer.gate.route(found)
    return layer.gate.route_to(found, batch.routes[index])


def router_input(x_TD: Tensor | None, batch: Batch) -> RouterInput:
    """Return what a router reads of a batch whose rows are ``x_TD``."""
    return RouterInput(
        x_TD,
        batch.ids_T,
        batch.positions_T,
        lengths=batch.lengths,
        tasks_T=batch.tasks_T,
        timesteps_T=batch.timesteps_T,
        draw_keys=batch.draw_keys,
        previous_ids_T=batch.previous_ids_T,
    )
