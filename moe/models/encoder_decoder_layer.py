"""A layer of an encoder-decoder: attention, perhaps attention to a source, then an MLP or experts.

T tokens, D model width, F inner width.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.relative import KeysValues, Meeting, RelativeAttention
from ..batch import Batch
from ..blocks.block import State
from ..blocks.residual import Residual
from ..config.encoder_decoder import EncoderDecoderConfig
from ..layer import MoELayer
from ..linear import Linear
from ..norm import RMSNorm
from ..routers.routing import Lookahead, Routing
from .options import WHOLE, ModelOptions
from .routed import LayerOutput, build_moe, choose
from .target_caches import TargetCaches


class Sources(NamedTuple):
    """What a target's layers read of the sources, if nothing of it is cached."""

    hidden_SD: Tensor
    grid: Grid


class StackRows(NamedTuple):
    """What the layers of a stack share in one forward."""

    batch: Batch
    own: Meeting
    """How rows meet those of their own sequence."""
    across: Meeting | None = None
    """How target rows meet those of their source."""
    sources: Sources | None = None
    caches: TargetCaches | None = None
    """In place of ``sources``."""
    first_layer: int = 0
    """The index of the stack's first layer."""


class PlainMLP(nn.Module):
    """A dense MLP without biases: ``down(relu(up x))``, or with a gate (T5 1.1)."""

    def __init__(self, d_model: int, d_ff: int, is_gated: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff) if is_gated else None
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the MLP's output."""
        up_TF: Tensor = self.up_proj(x_TD)
        if self.gate_proj is None:
            inner_TF = F.relu(up_TF)
        else:
            inner_TF = F.gelu(self.gate_proj(x_TD), approximate="tanh") * up_TF
        out_TD: Tensor = self.down_proj(inner_TF)
        return out_TD


class EncoderDecoderLayer(nn.Module):
    """Attention and an MLP or MoE layer, each behind a norm and inside a residual (T5's).

    A layer that writes the target has attention to the source between the two.
    """

    entries = ("source_keys_values",)
    """Methods that compute with the layer's parameters and are called from elsewhere."""

    def __init__(
        self, config: EncoderDecoderConfig, layer: int, options: ModelOptions = WHOLE
    ) -> None:
        super().__init__()
        self.layer = layer
        attention = (config.d_model, config.num_heads, config.head_width)
        self.self_norm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = RelativeAttention(*attention)
        self.cross_attn: RelativeAttention | None = None
        if layer >= config.num_source_layers:
            self.cross_norm = RMSNorm(config.d_model, config.norm_eps)
            self.cross_attn = RelativeAttention(*attention)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp: MoELayer | PlainMLP
        if config.moe is not None and config.is_moe(layer):
            self.mlp = build_moe(config, layer, options)
        else:
            assert config.d_ff is not None, "the configuration was not validated"
            is_gated = config.activation == "gated_gelu"
            self.mlp = PlainMLP(config.d_model, config.d_ff, is_gated)
        self.block = Residual() if config.moe is None else config.moe.block
        self.place = config.place(layer)

    def forward(
        self, x_TD: Tensor, state: State, rows: StackRows, routing: Routing | None
    ) -> LayerOutput:
        """Run the layer; ``routing`` is its choice if token ids decided it.

        ``state`` is what the block carries from the MoE layer before.
        """
        mlp = self.mlp
        if isinstance(mlp, MoELayer) and mlp.lookahead is Lookahead.ATTENTION_INPUT:
            routing = choose(self.layer, mlp, x_TD, rows.batch)
            mlp.experts.announce(routing)
        x_TD = x_TD + self._attend(self.self_norm(x_TD), rows)
        if self.cross_attn is not None:
            x_TD = x_TD + self._attend_across(self.cross_attn, self.cross_norm(x_TD), rows)
        if not isinstance(mlp, MoELayer):
            return LayerOutput(x_TD + mlp(self.mlp_norm(x_TD)), state)
        read_TD = self.mlp_norm(self.block.experts_read(x_TD, state))
        if routing is None:
            routing = choose(self.layer, mlp, read_TD, rows.batch)
        y_TD, routing = mlp(read_TD, routing=routing)
        x_TD, state = self.block.join(x_TD, y_TD, state, self.place)
        return LayerOutput(x_TD, state, routing)

    def source_keys_values(self, hidden_SD: Tensor, grid: Grid) -> KeysValues:
        """Return what targets meet in this layer of the sources' rows, before its forwards."""
        assert self.cross_attn is not None, "a layer that writes the target"
        return self.cross_attn.keys_values(hidden_SD, grid)

    def _attend(self, x_TD: Tensor, rows: StackRows) -> Tensor:
        met = self.self_attn.keys_values(x_TD, rows.own.grid)
        if rows.caches is not None:
            met = rows.caches.append(self.layer - rows.first_layer, met)
        attended_TD: Tensor = self.self_attn(x_TD, rows.own, met)
        return attended_TD

    def _attend_across(self, attention: RelativeAttention, x_TD: Tensor, rows: StackRows) -> Tensor:
        assert rows.across is not None, "a target's layer needs sources"
        if rows.caches is not None:
            met = rows.caches.sources[self.layer - rows.first_layer]
        else:
            assert rows.sources is not None, "neither sources nor caches"
            met = attention.keys_values(*rows.sources)
        attended_TD: Tensor = attention(x_TD, rows.across, met)
        return attended_TD
