"""A layer of an encoder: attention, then an MLP or experts, with norms after each (BERT's).

T tokens, D model width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.full import FullAttention, FullRows
from ..batch import Batch
from ..blocks.block import State
from ..blocks.residual import Residual
from ..config.encoder import EncoderConfig
from ..layer import MoELayer
from ..linear import Linear
from ..routers.routing import Lookahead, Routing
from .options import WHOLE, ModelOptions
from .routed import LayerOutput, build_moe, choose


class BiasedMLP(nn.Module):
    """A dense MLP ``down(gelu(up x))`` with biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_ff, bias=True)
        self.down_proj = Linear(d_ff, d_model, bias=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the MLP's output."""
        out_TD: Tensor = self.down_proj(F.gelu(self.up_proj(x_TD)))
        return out_TD


class EncoderLayer(nn.Module):
    """Attention and an MLP or MoE layer; the norm follows each sum of input and output."""

    def __init__(self, config: EncoderConfig, layer: int, options: ModelOptions = WHOLE) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = FullAttention(config.d_model, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.mlp: MoELayer | BiasedMLP
        if config.moe is not None and config.is_moe(layer):
            self.mlp = build_moe(config, layer, options)
        else:
            assert config.d_ff is not None, "the configuration was not validated"
            self.mlp = BiasedMLP(config.d_model, config.d_ff)
        self.block = Residual() if config.moe is None else config.moe.block
        self.place = config.place(layer)
        self.output_norm = nn.LayerNorm(config.d_model, config.norm_eps)

    def forward(
        self, x_TD: Tensor, state: State, batch: Batch, rows: FullRows, routing: Routing | None
    ) -> LayerOutput:
        """Run the layer; ``routing`` is its choice if token ids decided it.

        ``state`` is what the block carries from the MoE layer before.
        """
        mlp = self.mlp
        if isinstance(mlp, MoELayer) and mlp.lookahead is Lookahead.ATTENTION_INPUT:
            routing = choose(self.layer, mlp, x_TD, batch)
            mlp.experts.announce(routing)
        x_TD = self.attention_norm(x_TD + self.self_attn(x_TD, rows))
        if not isinstance(mlp, MoELayer):
            return LayerOutput(self.output_norm(x_TD + mlp(x_TD)), state)
        read_TD = self.block.experts_read(x_TD, state)
        if routing is None:
            routing = choose(self.layer, mlp, read_TD, batch)
        y_TD, routing = mlp(read_TD, routing=routing)
        x_TD, state = self.block.join(x_TD, y_TD, state, self.place)
        return LayerOutput(self.output_norm(x_TD), state, routing)
