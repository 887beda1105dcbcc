"""The shape of an encoder-decoder: the ``model`` section with ``kind: encoder_decoder``."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..blocks.block import Place
from ..routers.routing import Lookahead
from .model import LayersConfig

DenseActivation = Literal["relu", "gated_gelu"]
SMALLEST_BUCKETS = 4
"""Half of them are for each direction, and half of those for small distances."""


class EncoderDecoderConfig(LayersConfig):
    """An encoder-decoder with T5's layers; all are dense without ``moe``.

    The defaults are those of T5 (Raffel et al. 2020), and with ``moe`` those of Switch Transformer.
    The layers that read the source come first: they have the indices below ``source_layers``.
    """

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    """The model reads a source text and writes a target text."""
    source_layers: int | None = Field(default=None, ge=1)
    """How many of the layers read the source; None = half of ``num_layers``. The others write the
    target, and also attend to the source."""
    head_dim: int | None = Field(default=None, ge=1, le=1 << 14)
    """Width of a head; None = d_model / num_heads."""
    max_positions: int = Field(default=512, ge=1, le=1 << 20)
    """Longest source, and longest target, in tokens."""
    activation: DenseActivation = "relu"
    """Activation of the dense layers' MLPs. ``gated_gelu`` is T5 1.1's: tanh-GELU of a gate."""
    num_buckets: int = Field(default=32, ge=SMALLEST_BUCKETS, le=1 << 12)
    """Distances between tokens that attention tells apart; far ones share a bucket."""
    max_distance: int = Field(default=128, ge=2, le=1 << 20)
    """Distances from here on are one bucket."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding's weights for the output layer too."""
    scale_outputs: bool = True
    """Multiply rows by ``d_model ** -0.5`` before the output layer, as T5 does where it has the
    embedding's weights."""
    start_id: int | None = Field(default=None, ge=0)
    """The token before each target; training fills in the one that ends a text."""

    @property
    def generates(self) -> bool:
        """Whether the model continues texts."""
        return False

    @property
    def writes_text(self) -> bool:
        """Whether an id ends what the model writes."""
        return True

    @property
    def layers_share_rows(self) -> bool:
        """Whether all layers compute the same rows."""
        return False

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output layer has the embedding's weights."""
        return self.tie_embeddings

    @property
    def num_source_layers(self) -> int:
        """Layers that read the source."""
        return self.num_layers // 2 if self.source_layers is None else self.source_layers

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.num_heads

    def place(self, layer: int) -> Place:
        """Return where ``layer`` stands among the MoE layers that read, or among those that write.

        The stream of rows begins anew with the target, and so does a block's state.
        """
        reads = layer < self.num_source_layers
        own = [one for one in self.moe_layers if (one < self.num_source_layers) == reads]
        return Place(sum(earlier < layer for earlier in own), len(own))

    def architecture(self) -> dict[str, Any]:
        """See :meth:`LayersConfig.architecture`."""
        values = super().architecture()
        values |= {"source_layers": self.num_source_layers, "head_dim": self.head_width}
        if len(self.moe_layers) == self.num_layers:
            values["activation"] = None
        return values

    def generation_values(self) -> dict[str, Any]:
        """Return which token each target begins with."""
        return {"decoder_start_token_id": self.start_id}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= self.num_source_layers < self.num_layers:
            raise ValueError(
                f"source_layers is {self.num_source_layers} of num_layers = {self.num_layers}; "
                "leave one layer or more to read the source and one or more to write the target."
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model is {self.d_model}, which does not split into {self.num_heads} heads; set "
                "head_dim or use a multiple."
            )
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance is {self.max_distance}, but half of num_buckets = "
                f"{self.num_buckets} are exact distances; use a max_distance above "
                f"{self.num_buckets // 2}."
            )
        if self.start_id is not None and self.start_id >= (self.vocab_size or 1 << 24):
            raise ValueError(
                f"start_id is {self.start_id}, but vocab_size is {self.vocab_size}; use an id "
                "below it."
            )
        self.check_layers({"dense_layers": self.dense_layers})
        lookahead = None if self.moe is None else self.moe.router.reads_at()
        if lookahead is Lookahead.PREVIOUS_BLOCK:
            raise ValueError(
                "moe.router.lookahead is previous_block, which encoder-decoders do not offer; use "
                "ffn_input."
            )
        return self
