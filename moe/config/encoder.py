"""The shape of an encoder: the ``model`` section with ``kind: encoder``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ..routers.routing import Lookahead
from .model import LayersConfig
from .moe import WIDEST

MOST_LABELS = 1 << 16
HEAD = ("classifier.weight", "classifier.bias")
"""The tensors of an encoder that belong to its labels."""


class EncoderConfig(LayersConfig):
    """An encoder that classifies texts, with BERT's layers; all are dense without ``moe``.

    The defaults are those of BERT (Devlin et al. 2019).
    """

    kind: Literal["encoder"] = "encoder"
    """The model reads whole texts and gives each a label."""
    max_positions: int = Field(default=512, ge=1, le=1 << 20)
    """Longest text in tokens; each position has an embedding."""
    num_types: int = Field(default=2, ge=1, le=WIDEST)
    """Rows of the embedding of segments, such as question and answer; texts have the first."""
    norm_eps: float = Field(default=1e-12, gt=0)
    """Added to the variance in LayerNorm."""
    labels: tuple[str, ...] = Field(default=(), max_length=MOST_LABELS)
    """What a text may be, in the order of the head's rows; training fills them in from the data.
    Without labels there is no head."""

    @property
    def generates(self) -> bool:
        """Whether the model continues texts."""
        return False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model is {self.d_model}, which does not split into {self.num_heads} heads; use "
                "a multiple."
            )
        self.check_layers({"dense_layers": self.dense_layers})
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError(
                f"labels has {len(self.labels)} entries, {len(set(self.labels))} different; "
                "give two or more, each once."
            )
        lookahead = None if self.moe is None else self.moe.router.reads_at()
        if lookahead is Lookahead.PREVIOUS_BLOCK:
            raise ValueError(
                "moe.router.lookahead is previous_block, which encoders do not offer; use "
                "ffn_input."
            )
        return self

    def fresh_tensors(self, stored: LayersConfig) -> tuple[str, ...]:
        """Return the head's tensors, unless the ``stored`` model has a head for the same labels."""
        has_same = isinstance(stored, EncoderConfig) and stored.labels == self.labels
        return () if has_same else HEAD
