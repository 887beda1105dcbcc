"""A layer of a decoder: attention, then an MLP or experts.

T tokens, D model width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..attention.backend import backends, run_attention
from ..attention.grouped_query import Attention
from ..attention.latent import LatentAttention
from ..attention.parts import Part
from ..batch import Batch
from ..blocks.block import State
from ..blocks.residual import Residual
from ..config.model import ModelConfig
from ..gated_mlp import GatedMLP
from ..layer import MoELayer
from ..norm import RMSNorm
from ..routers.routing import Lookahead, Routing
from .options import WHOLE, ModelOptions
from .routed import LayerOutput, build_moe, choose, router_input


class DecoderLayer(nn.Module):
    """Attention and an MLP or MoE layer, each behind a norm and inside a residual.

    A block of ``moe.block`` takes the place of the MoE layer's residual, and carries its state past
    dense layers. Attention and dense layers keep theirs.

    Routers run where their look-ahead says, and choices are announced to the experts immediately.
    """

    def __init__(self, config: ModelConfig, layer: int, options: ModelOptions = WHOLE) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.self_attn: Attention | LatentAttention
        if config.attention.latent is None:
            self.self_attn = Attention(config, layer)
        else:
            self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.block = Residual() if config.moe is None else config.moe.block
        self.place = config.place(layer)
        self.mlp: MoELayer | GatedMLP
        if config.moe is not None and config.is_moe(layer):
            self.mlp = build_moe(config, layer, options)
        else:
            assert config.d_ff is not None, "the configuration was not validated"
            self.mlp = GatedMLP(config.d_model, config.d_ff)
        self._attention_backends = backends(layer, config.rms_eps)

    def forward(
        self,
        x_TD: Tensor,
        state: State,
        batch: Batch,
        parts: Sequence[Part],
        routing: Routing | None = None,
        following: tuple[int, MoELayer] | None = None,
        keeps_mlp_input: bool = False,
    ) -> LayerOutput:
        """Run the layer.

        ``state`` is what the block carries from the MoE layer before. ``routing`` is this layer's
        choice if it was made earlier. ``following`` is the next MoE layer and its index, if its
        router reads what this layer's experts read (pre-gating).
        """
        if isinstance(self.mlp, MoELayer) and self.mlp.lookahead is Lookahead.ATTENTION_INPUT:
            routing = choose(self.layer, self.mlp, x_TD, batch)
            self.mlp.experts.announce(routing)
        x_TD, mlp_input_TD = run_attention(self._attention_backends, self._modules, x_TD, parts)
        if isinstance(self.mlp, GatedMLP):
            routing = self.mlp.route(router_input(mlp_input_TD, batch))
            y_TD = self.mlp(mlp_input_TD, batch.adapters, routing)
            return LayerOutput(x_TD + y_TD, state, routing)
        read_TD = self.block.experts_read(x_TD, state)
        if read_TD is not x_TD:
            mlp_input_TD = self.post_attention_layernorm(read_TD)
        if routing is None:
            routing = choose(self.layer, self.mlp, mlp_input_TD, batch)
        next_routing = None
        if following is not None:
            next_routing = choose(*following, mlp_input_TD, batch)
            self.mlp.experts.keep(routing)  # prefetching the next layer's must not evict them
            following[1].experts.announce(next_routing)
        y_TD, routing = self.mlp(
            mlp_input_TD, routing=routing, adapters=batch.adapters, core=batch.core
        )
        kept_TD = mlp_input_TD if keeps_mlp_input else None
        x_TD, state = self.block.join(x_TD, y_TD, state, self.place)
        return LayerOutput(x_TD, state, routing, next_routing, kept_TD)
