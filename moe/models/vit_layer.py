"""A layer of a vision transformer: attention, then an MLP or experts, with norms before each.

T tokens, D model width.
"""

from torch import Tensor, nn

from ..attention.full import FullAttention, FullRows
from ..batch import Batch
from ..blocks.block import State
from ..blocks.residual import Residual
from ..config.vit import ViTConfig
from ..layer import MoELayer
from ..routers.routing import Lookahead
from .encoder_layer import BiasedMLP
from .options import WHOLE, ModelOptions
from .routed import LayerOutput, build_moe, choose


class ViTLayer(nn.Module):
    """Attention and an MLP or MoE layer, each behind a norm and inside a residual.

    A block of ``moe.block`` takes the place of the MoE layer's residual.
    """

    def __init__(self, config: ViTConfig, layer: int, options: ModelOptions = WHOLE) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.self_attn = FullAttention(config.d_model, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.mlp: MoELayer | BiasedMLP
        if config.is_moe(layer):
            self.mlp = build_moe(config, layer, options)
        else:
            assert config.d_ff is not None, "the configuration was not validated"
            self.mlp = BiasedMLP(config.d_model, config.d_ff)
        self.block = Residual() if config.moe is None else config.moe.block
        self.place = config.place(layer)

    def forward(self, x_TD: Tensor, state: State, batch: Batch, rows: FullRows) -> LayerOutput:
        """Run the layer; ``state`` is what the block carries from the MoE layer before."""
        mlp, routing = self.mlp, None
        if isinstance(mlp, MoELayer) and mlp.lookahead is Lookahead.ATTENTION_INPUT:
            routing = choose(self.layer, mlp, x_TD, batch)
            mlp.experts.announce(routing)
        x_TD = x_TD + self.self_attn(self.attention_norm(x_TD), rows)
        if not isinstance(mlp, MoELayer):
            return LayerOutput(x_TD + mlp(self.mlp_norm(x_TD)), state)
        read_TD = self.mlp_norm(self.block.experts_read(x_TD, state))
        if routing is None:
            routing = choose(self.layer, mlp, read_TD, batch)
        y_TD, routing = mlp(read_TD, routing=routing)
        x_TD, state = self.block.join(x_TD, y_TD, state, self.place)
        return LayerOutput(x_TD, state, routing)
