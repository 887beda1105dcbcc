"""Variants of attention layers: the ``attention`` section of a configuration."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LinearRope(_Section):
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)
    """How many times longer than the original the context is."""


class Llama3Rope(_Section):
    """Llama 3.1's: low frequencies divided by ``factor``, high ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    """How many times longer than the original the context is."""
    low_freq_factor: float = Field(gt=0)
    """Frequencies with fewer turns than this over the original positions are divided."""
    high_freq_factor: float = Field(gt=0)
    """Frequencies with more turns than this over the original positions are kept."""
    original_max_positions: int = Field(ge=1)
    """Positions the model was trained with before it was extended."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}; it must be above low_freq_factor = "
                f"{self.low_freq_factor}."
            )
        return self


class YarnRope(_Section):
    """YaRN (Peng et al. 2023), with DeepSeek's factors on attention."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    """How many times longer than the original the context is."""
    original_max_positions: int = Field(ge=1)
    """Positions the model was trained with before it was extended."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies with more turns than this over the original positions are kept."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies with fewer turns than this are divided by ``factor``."""
    truncate: bool = True
    """Round the ends of the ramp between the two to whole dimensions."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Factor on cosines and sines; None = from ``factor``, ``mscale`` and ``mscale_all_dim``."""
    mscale: float | None = None
    """DeepSeek's factor on cosines and sines, with ``mscale_all_dim``."""
    mscale_all_dim: float | None = None
    """DeepSeek's factor; with latent attention it also scales the softmax."""


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


class LatentConfig(_Section):
    """Multi-head latent attention (DeepSeek-V2): a cache keeps one narrow row per position."""

    q_rank: int | None = Field(default=None, ge=1)
    """Latent width of queries; None = queries are projected directly."""
    kv_rank: int = Field(ge=1)
    """Latent width of keys and values."""
    nope_dim: int = Field(ge=1)
    """Width of the part of a head's query and key without position."""
    rope_dim: int = Field(ge=2, multiple_of=2)
    """Width of the part with rotary position; all heads share its key."""
    v_dim: int = Field(ge=1)
    """Width of a head's value."""


class AttentionConfig(_Section):
    """The attention of all layers; the defaults are Qwen3's."""

    qk_norm: Literal["head", "projection"] | None = "head"
    """RMSNorm of queries and keys: per head (Qwen3), over all heads together (OLMoE), or none.
    Latent attention has separate norms."""
    qkv_bias: bool = False
    """Biases on the projections from the model's width (Qwen2, gpt-oss)."""
    o_bias: bool = False
    """A bias on the output projection (gpt-oss)."""
    clip_qkv: float | None = Field(default=None, gt=0)
    """Largest magnitude of queries, keys and values (OLMoE)."""
    sinks: bool = False
    """A learned logit per head that takes probability but has no value (gpt-oss)."""
    window: int | None = Field(default=None, ge=1)
    """Positions that layers of ``window_layers`` see, their own included."""
    window_layers: tuple[int, ...] = ()
    """Layers that see no further back than ``window``."""
    nope_layers: tuple[int, ...] = ()
    """Layers without rotary embedding (SmallThinker)."""
    rope_interleaved: bool = False
    """Rotate neighbouring elements against each other (DeepSeek) rather than a head's halves."""
    latent: LatentConfig | None = None
    """Latent attention instead of grouped-query attention."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window_layers and self.window is None:
            raise ValueError("window_layers is given, but window is not; give its positions.")
        latent_has_none = (
            (self.clip_qkv, "clip_qkv"),
            (self.sinks, "sinks"),
            (self.window, "window"),
            (self.nope_layers, "nope_layers"),
        )
        for value, name in latent_has_none:
            if self.latent is not None and value:
                raise ValueError(
                    f"{name} is {value}, which latent attention does not support; leave it out."
                )
        return self

    def layer_window(self, layer: int) -> int | None:
        """Return how many positions a layer sees; None = all."""
        return self.window if layer in self.window_layers else None
