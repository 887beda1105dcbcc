"""The shape of a Moirai-MoE: the ``model`` section with ``kind: moirai``."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..routers.routing import Lookahead
from .model import LONGEST, LayersConfig, ModelConfig

MOST_SAMPLES = 1 << 20
NOT_OF_WEIGHTS = ("scaler_share", "num_samples")
"""Fields that weights do not depend on."""


class MoiraiConfig(LayersConfig):
    """A decoder of patches of time series, which forecasts a distribution (Liu et al. 2024).

    All layers are dense without ``moe``. The defaults are those of Moirai-MoE.
    """

    row_name: ClassVar[str] = "patch"
    row_names: ClassVar[str] = "patches"

    kind: Literal["moirai"] = "moirai"
    """The model reads series in patches and forecasts them by samples."""
    patch: int = Field(default=16, ge=1, le=1 << 12)
    """Points of a patch. A patch is one row of the model."""
    head_dim: int | None = Field(default=None, ge=4, le=1 << 14, multiple_of=4)
    """Width of a head; None = d_model / num_heads. Half of it is rotated by the position."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary positions' wavelengths."""
    rms_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    max_positions: int = Field(default=8192, ge=2, le=LONGEST)
    """Most points of a series, those of the forecast included; two patches or more."""
    scaler_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of a training series, from its beginning, whose mean and deviation scale all of it.
    These patches are read, but not scored. At least one patch is such."""
    num_samples: int = Field(default=100, ge=1, le=MOST_SAMPLES)
    """Futures that a forecast draws for each series; mean and quantiles are theirs."""

    @property
    def generates(self) -> bool:
        """Whether the model continues texts."""
        return False

    @property
    def reads_tokens(self) -> bool:
        """Whether rows are tokens of a vocabulary."""
        return False

    @property
    def has_gated_mlps(self) -> bool:
        """See :attr:`LayersConfig.has_gated_mlps`."""
        return True

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def most_patches(self) -> int:
        """Most patches of a series, those of the forecast included."""
        return self.max_positions // self.patch

    @property
    def decoder(self) -> ModelConfig:
        """The decoder that has the same layers."""
        return ModelConfig(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_width,
            d_ff=self.d_ff,
            moe=self.moe,
            dense_layers=self.dense_layers,
            max_positions=self.most_patches,
            rope_theta=self.rope_theta,
            rms_eps=self.rms_eps,
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.d_model % (4 * self.num_heads):
            raise ValueError(
                f"d_model is {self.d_model}, which does not split into {self.num_heads} heads "
                "whose width is a multiple of 4; set head_dim or change num_heads."
            )
        if self.most_patches < 2:
            raise ValueError(
                f"max_positions is {self.max_positions}, which is less than two patches of "
                f"{self.patch} points; raise it, or lower patch."
            )
        self.check_layers({"dense_layers": self.dense_layers})
        lookahead = None if self.moe is None else self.moe.router.reads_at()
        if lookahead is Lookahead.PREVIOUS_BLOCK:
            raise ValueError(
                "moe.router.lookahead is previous_block, which models of series do not offer; use "
                "ffn_input."
            )
        return self

    def architecture(self) -> dict[str, Any]:
        """See :meth:`LayersConfig.architecture`."""
        values = super().architecture()
        for name in NOT_OF_WEIGHTS:
            del values[name]
        return values | {"head_dim": self.head_width}
