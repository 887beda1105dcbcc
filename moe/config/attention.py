"""What attention layers differ in from model to model: a configuration's ``attention`` section."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LinearRope(_Section):
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)


class Llama3Rope(_Section):
    """Llama 3.1's: low frequencies divided by ``factor``, high ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
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
    original_max_positions: int = Field(ge=1)
    """Positions the model was trained with before it was extended."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies that turn more often than this in the original positions are kept."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies that turn less often than this are divided by ``factor``."""
    truncate: bool = True
    """Round the ends of the ramp between to whole dimensions."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Factor on cosines and sines; None = from ``factor``, ``mscale`` and ``mscale_all_dim``."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """DeepSeek's: with latent attention it scales the softmax, too."""


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


class LatentConfig(_Section):
    """Multi-head latent attention (DeepSeek-V2): a cache keeps one narrow row per position."""

    q_rank: int | None = Field(default=None, ge=1)
    """Width queries are squeezed through; None = not at all."""
    kv_rank: int = Field(ge=1)
    """Width keys and values are squeezed through."""
    nope_dim: int = Field(ge=1)
    """Part of a head's query and key without position."""
    rope_dim: int = Field(ge=2, multiple_of=2)
    """Part with rotary position, its key shared by all heads."""
    v_dim: int = Field(ge=1)
    """Width of a head's value."""


class AttentionConfig(_Section):
    """The attention of all layers; the defaults are Qwen3's."""

    qk_norm: Literal["head", "projection"] | None = "head"
    """RMSNorm of queries and keys: per head (Qwen3), over all heads together (OLMoE), or none.
    Latent attention has its own norms."""
    qkv_bias: bool = False
    """Biases on the projections from the model's width (Qwen2, gpt-oss)."""
    o_bias: bool = False
    """A bias on the output projection (gpt-oss)."""
    clip_qkv: float | None = Field(default=None, gt=0)
    """Largest magnitude of queries, keys and values (OLMoE)."""
    sinks: bool = False
    """A learned logit per head that takes probability and gives nothing (gpt-oss)."""
    window: int | None = Field(default=None, ge=1)
    """Positions that layers of ``window_layers`` see, their own included."""
    window_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()
    """Layers without rotary embedding (SmallThinker)."""
    rope_interleaved: bool = False
    """Rotate neighbouring elements against each other (DeepSeek) rather than a head's halves."""
    latent: LatentConfig | None = None
    """Latent attention in place of grouped-query attention."""

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
