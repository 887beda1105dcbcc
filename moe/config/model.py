"""The shape of a decoder, and what all kinds of models share: the ``model`` section."""

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import ConfigError
from ..blocks.block import Place
from ..routers.router import RouterConfig
from ..routers.routing import Lookahead
from ..routers.row_facts import RowFact
from .attention import AttentionConfig, RopeScaling
from .moe import WIDEST, MoEConfig

# Bounds: absurd values, for example from a damaged file, are refused before any allocation.
MOST_LAYERS = 10_000
LONGEST = 1 << 30
"""Tokens of a sequence."""


class LayersConfig(BaseModel):
    """What all kinds of models have: layers with attention, and with an MLP or experts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    row_name: ClassVar[str] = "token"
    row_names: ClassVar[str] = "tokens"
    """What rows between layers are: one of them, and several."""
    kind: str
    """What the model is; a subclass has one value."""
    vocab_size: int | None = Field(default=None, ge=1, le=WIDEST)
    """Rows of the embedding; training fills it in from the tokenizer."""
    d_model: int = Field(ge=1, le=WIDEST)
    """Width of a token's vector between layers."""
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    """Layers, each with attention and an MLP or experts."""
    num_heads: int = Field(ge=1, le=1 << 14)
    """Query heads of attention."""
    d_ff: int | None = Field(default=None, ge=1, le=WIDEST)
    """Inner width of the dense layers' MLPs; required if there are dense layers."""
    moe: MoEConfig | None = None
    """The experts; None makes all layers dense."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a dense MLP instead of experts."""
    max_positions: int = Field(default=2048, ge=1, le=LONGEST)
    """Longest sequence in tokens."""

    @property
    def generates(self) -> bool:
        """Whether the model continues texts."""
        return True

    @property
    def writes_text(self) -> bool:
        """Whether an id ends what the model writes; folders then say which."""
        return self.generates

    @property
    def reads_tokens(self) -> bool:
        """Whether rows are tokens of a vocabulary."""
        return True

    @property
    def rows_have(self) -> frozenset[RowFact]:
        """What a batch says of each row in addition, for routers that read it."""
        return frozenset({"token_ids"}) if self.reads_tokens else frozenset()

    @property
    def has_gated_mlps(self) -> bool:
        """Whether the MLPs of dense layers are like experts with ``swiglu``."""
        return False

    @property
    def layers_share_rows(self) -> bool:
        """Whether all layers compute the same rows, as route files have them."""
        return True

    @property
    def ties_embeddings(self) -> bool:
        """Whether an output layer has the embedding's weights."""
        return False

    @property
    def vocabulary(self) -> int:
        """``vocab_size`` once it is known."""
        assert self.vocab_size is not None, "vocab_size is not filled in yet"
        return self.vocab_size

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that have experts."""
        return [layer for layer in range(self.num_layers) if self.is_moe(layer)]

    def is_moe(self, layer: int) -> bool:
        """Say whether ``layer`` has experts."""
        return self.moe is not None and layer not in self.dense_layers

    def router(self, layer: int) -> RouterConfig:
        """Return the router configuration of an MoE layer; that of the first may differ."""
        assert self.moe is not None and self.is_moe(layer), "only MoE layers have routers"
        is_first = not any(self.is_moe(earlier) for earlier in range(layer))
        return self.moe.router.for_first_layer() if is_first else self.moe.router

    def place(self, layer: int) -> Place:
        """Return where ``layer`` stands among the MoE layers: how many are before it, and all."""
        layers = self.moe_layers
        return Place(sum(earlier < layer for earlier in layers), len(layers))

    def fresh_tensors(self, stored: "LayersConfig") -> tuple[str, ...]:
        """Return the tensors that begin anew where the others come from a ``stored`` model."""
        return ()

    def architecture(self) -> dict[str, Any]:
        """Return the fields that the meaning of weights depends on: all but training-only ones.

        Equivalent configurations give equal results.
        """
        values = self.model_dump(mode="json")
        values["dense_layers"] = sorted(set(self.dense_layers)) if self.moe is not None else []
        if len(self.moe_layers) == self.num_layers:
            values["d_ff"] = None
        if self.moe is not None:
            values["moe"]["router"] = self.moe.router.architecture()
            values["moe"]["block"] = self.moe.block.architecture()
        return values

    def generation_values(self) -> dict[str, Any]:
        """Return what ``generation_config.json`` says of the model alone."""
        return {}

    def check_layers(self, named: dict[str, tuple[int, ...]]) -> None:
        """Raise ``ValueError`` where a list names a layer that is not there, or ``d_ff`` lacks."""
        for name, layers in named.items():
            outside = [layer for layer in layers if not 0 <= layer < self.num_layers]
            if outside:
                raise ValueError(
                    f"{name} names layer {outside[0]}, but there are {self.num_layers}; "
                    f"use 0 to {self.num_layers - 1}."
                )
        if self.d_ff is None and (self.moe is None or self.dense_layers):
            raise ValueError("d_ff is missing, but some layers are dense; give their width.")


class ModelConfig(LayersConfig):
    """A decoder; all layers are dense without ``moe``. The defaults are Qwen3-MoE's."""

    kind: Literal["decoder"] = "decoder"
    """The model continues texts. See ``encoder`` for the other kind."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); None = num_heads."""
    head_dim: int | None = Field(default=None, ge=2, le=1 << 14, multiple_of=2)
    """Width of a head; None = d_model / num_heads."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary positions' wavelengths."""
    rope_scaling: RopeScaling | None = None
    """How rotary positions are scaled beyond the original ones."""
    rms_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in RMSNorm."""
    attention: AttentionConfig = AttentionConfig()
    tie_embeddings: bool = False
    """Use the embedding's weights for the output layer too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which num_kv_heads = {self.num_kv_heads} does "
                f"not divide; use a divisor of {self.num_heads}."
            )
        needs_width = self.head_dim is None and self.attention.latent is None
        if needs_width and self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model is {self.d_model}, which does not split into {self.num_heads} heads of "
                "even width; set head_dim or change num_heads."
            )
        self.check_layers(
            {
                "dense_layers": self.dense_layers,
                "attention.window_layers": self.attention.window_layers,
                "attention.nope_layers": self.attention.nope_layers,
            }
        )
        num_moe_layers = self.num_layers - len(set(self.dense_layers))
        is_pregated = (
            self.moe is not None and self.moe.router.reads_at() is Lookahead.PREVIOUS_BLOCK
        )
        if is_pregated and num_moe_layers < 2:
            raise ValueError(
                f"moe.router.lookahead is previous_block, but the model has {num_moe_layers} MoE "
                "layer(s); use two or more, or lookahead: ffn_input."
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def rope_width(self) -> int:
        """Elements of a head that are rotated."""
        latent = self.attention.latent
        return self.head_width if latent is None else latent.rope_dim

    @property
    def has_gated_mlps(self) -> bool:
        """See :attr:`LayersConfig.has_gated_mlps`."""
        return True

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head has the embedding's weights."""
        return self.tie_embeddings

    def architecture(self) -> dict[str, Any]:
        """See :meth:`LayersConfig.architecture`."""
        values = super().architecture()
        del values["kind"]  # models of older releases have none, and keep their identity
        values["num_kv_heads"] = self.kv_heads if self.attention.latent is None else None
        values["head_dim"] = self.head_width if self.attention.latent is None else None
        attention = values["attention"]
        for name in ("window_layers", "nope_layers"):
            attention[name] = sorted(set(attention[name]))
        if not attention["window_layers"]:
            attention["window"] = None
        if self.attention.latent is not None:
            attention["qk_norm"] = None
        return values


def check_gated_mlps(config: LayersConfig) -> None:
    """Raise :class:`ConfigError` for a model whose MLPs cannot become experts."""
    if not config.has_gated_mlps:
        raise ConfigError(
            f"the model is of kind {config.kind}, and this works with MLPs that have a gate, as "
            "experts have; give such a model, for example a decoder."
        )


def decoder_config(config: LayersConfig) -> ModelConfig:
    """Return the configuration of a decoder; raise :class:`ConfigError` for another model."""
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"the model is of kind {config.kind}, and this works with decoders only; give one."
        )
    return config
