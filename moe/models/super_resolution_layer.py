"""A layer of a super-resolution model: attention, then an MLP or experts, as the timestep says.

T tokens, D model width, B images, L tokens of an image.
"""

from torch import Tensor, nn

from ..attention.full import FullAttention, FullRows
from ..batch import Batch
from ..config.super_resolution import SuperResolutionConfig
from ..gated_mlp import GatedMLP
from ..layer import MoELayer
from ..linear import FromZero
from ..routers.routing import Lookahead, Routing
from .options import WHOLE, ModelOptions
from .routed import LayerOutput, build_moe, choose


class SuperResolutionLayer(nn.Module):
    """Attention and an MLP or MoE layer, each behind a norm that the timestep shifts and scales.

    The timestep also weighs what they add (adaLN-Zero; Peebles and Xie 2023), 0 at first.
    """

    def __init__(
        self, config: SuperResolutionConfig, layer: int, options: ModelOptions = WHOLE
    ) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps, False)
        self.self_attn = FullAttention(config.d_model, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.d_model, config.norm_eps, False)
        self.mlp: MoELayer | GatedMLP
        if config.moe is not None and config.is_moe(layer):
            self.mlp = build_moe(config, layer, options)
        else:
            assert config.d_ff is not None, "the configuration was not validated"
            activation = "swiglu" if config.moe is None else config.moe.activation
            self.mlp = GatedMLP(config.d_model, config.d_ff, activation)
        self.modulation = FromZero(config.d_model, 6 * config.d_model)

    def forward(
        self, x_TD: Tensor, time_BD: Tensor, batch: Batch, rows: FullRows, routing: Routing | None
    ) -> LayerOutput:
        """Run the layer; ``routing`` is its choice if timesteps decided it."""
        mlp = self.mlp
        if isinstance(mlp, MoELayer) and mlp.lookahead is Lookahead.ATTENTION_INPUT:
            routing = choose(self.layer, mlp, x_TD, batch)
            mlp.experts.announce(routing)
        parts = of_rows(self.modulation(time_BD), len(x_TD)).chunk(6, dim=1)
        shift_TD, scale_TD, gate_TD = parts[:3]
        read_TD = self.attention_norm(x_TD) * (1 + scale_TD) + shift_TD
        x_TD = x_TD + gate_TD * self.self_attn(read_TD, rows)
        shift_TD, scale_TD, gate_TD = parts[3:]
        read_TD = self.mlp_norm(x_TD) * (1 + scale_TD) + shift_TD
        if not isinstance(mlp, MoELayer):
            return LayerOutput(x_TD + gate_TD * mlp(read_TD), ())
        if routing is None:
            routing = choose(self.layer, mlp, read_TD, batch)
        y_TD, routing = mlp(read_TD, routing=routing)
        return LayerOutput(x_TD + gate_TD * y_TD, (), routing)


def of_rows(values_BD: Tensor, num_rows: int) -> Tensor:
    """Return the values of each row's image; all images have equally many rows."""
    return values_BD.repeat_interleave(num_rows // max(1, len(values_BD)), dim=0)
