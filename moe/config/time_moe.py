"""The shape of Time-MoE: the ``model`` section with ``kind: time_moe``."""

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..routers.routing import Lookahead
from .attention import AttentionConfig
from .model import LayersConfig, ModelConfig

LONGEST_HORIZON = 1 << 16
"""Points that one head may predict."""


class TimeMoeConfig(LayersConfig):
    """A forecaster of series that reads point by point; all layers are dense without ``moe``.

    The defaults are those of the released models (Shi et al. 2024). Each of their MoE layers also
    has ``d_shared: d_ff``, ``shared_gate: true`` and experts of width ``d_ff / k``.
    """

    row_name: ClassVar[str] = "point"
    row_names: ClassVar[str] = "points"

    kind: Literal["time_moe"] = "time_moe"
    """The model continues series of numbers, one row for each point."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); None = num_heads."""
    max_positions: int = Field(default=4096, ge=1, le=1 << 30)
    """Most points of a context and its forecast together."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary positions' wavelengths."""
    rms_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in RMSNorm."""
    horizons: tuple[Annotated[int, Field(ge=1, le=LONGEST_HORIZON)], ...] = Field(
        default=(1, 8, 32, 64), min_length=1, max_length=64
    )
    """Points that each head predicts at once, in rising order."""
    huber_delta: float = Field(default=2.0, gt=0)
    """Error at which the loss goes over from squares to absolute values (Huber)."""

    @property
    def reads_tokens(self) -> bool:
        """Rows are points of a series."""
        return False

    @property
    def generates(self) -> bool:
        """It continues series, not texts."""
        return False

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model is {self.d_model}, which does not split into {self.num_heads} heads of "
                "even width; change num_heads."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which num_kv_heads = {self.num_kv_heads} does "
                f"not divide; use a divisor of {self.num_heads}."
            )
        if any(later <= earlier for earlier, later in pairwise(self.horizons)):
            raise ValueError(
                f"horizons is {list(self.horizons)}; give whole numbers that rise, such as "
                "[1, 8, 32, 64]."
            )
        self.check_layers({"dense_layers": self.dense_layers})
        if self.moe is not None:
            router = self.moe.router
            reason = router.why_not_causal()
            if reason is not None:
                raise ValueError(f"moe.{reason}")
            if router.reads_at() in (Lookahead.PREVIOUS_BLOCK, Lookahead.TOKEN):
                raise ValueError(
                    f"moe.router chooses at {router.reads_at().value}, which models of series do "
                    "not offer; use a router that reads rows, with lookahead: ffn_input."
                )
            if router.reads_previous_ids():
                raise ValueError(
                    f"moe.router is {router.kind}, which reads token ids, and a series has none; "
                    "use another router."
                )
        return self

    def decoder(self) -> ModelConfig:
        """Return the configuration of a decoder with the same layers.

        It is not checked again: it may have no layers, and no vocabulary.
        """
        same = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "moe")
        also = ("dense_layers", "max_positions", "rope_theta", "rms_eps")
        fields = {name: getattr(self, name) for name in (*same, *also)}
        attention = AttentionConfig(qk_norm=None, qkv_bias=True)
        return ModelConfig.model_construct(**fields, attention=attention)

    def architecture(self) -> dict[str, Any]:
        """See :meth:`LayersConfig.architecture`."""
        values = super().architecture()
        del values["huber_delta"]
        values["num_kv_heads"] = self.kv_heads
        return values
