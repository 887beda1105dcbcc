"""A calibration text on its way through a decoder, one layer at a time.

T tokens of a batch, N rows of the text (those of all batches), D model width, K choices.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...moe.batch import Batch
from ...moe.layer import MoELayer
from ...moe.models.decoder import Decoder
from ...moe.models.stage_rows import StageRows


class Seen(NamedTuple):
    """What passed a layer."""

    x_ND: Tensor
    """What its experts read."""
    experts_NK: Tensor
    weights_NK: Tensor
    out_TD: list[Tensor]
    """The residual stream after the layer, by batch."""


class LayerRows(NamedTuple):
    """The rows of a text before some layer of a decoder."""

    batches: Sequence[Batch]
    rows: Sequence[StageRows | None]
    """By batch; None before the first layer."""

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "LayerRows":
        """Return the rows before the first layer."""
        return cls(batches, [None] * len(batches))

    @torch.inference_mode()
    def through(self, decoder: Decoder, layer: int) -> "LayerRows":
        """Return the rows after the layer that they are before."""
        part = decoder.part(range(layer, layer + 1))
        outputs = [part(batch, rows) for batch, rows in zip(self.batches, self.rows, strict=True)]
        return LayerRows(self.batches, [output.for_next_stage() for output in outputs])

    def outputs(self, decoder: Decoder, layer: int) -> tuple["LayerRows", list[Tensor]]:
        """Return the rows after a layer, and the residual stream there by batch, ``[T, D]``.

        They differ after the last layer: rows have gone through the final norm.
        """
        found: list[Tensor] = []
        handle = decoder.layers[layer].register_forward_hook(partial(_keep_stream, found))
        try:
            after = self.through(decoder, layer)
        finally:
            handle.remove()
        return after, found

    def seen(self, decoder: Decoder, layer: int, mlp: MoELayer) -> Seen:
        """Return what passes an MoE layer, whose module is ``mlp``."""
        found: list[tuple[Tensor, ...]] = []
        handle = mlp.experts.register_forward_pre_hook(partial(_keep_arguments, found))
        try:
            _, out_TD = self.outputs(decoder, layer)
        finally:
            handle.remove()
        assert found, "the layer ran none of its experts"
        x_ND, experts_NK, weights_NK = (torch.cat(part) for part in zip(*found, strict=True))
        return Seen(x_ND, experts_NK, weights_NK, out_TD)


def _keep_stream(
    found: list[Tensor], _: nn.Module, arguments: tuple[Any, ...], output: Any
) -> None:
    found.append(output.x_TD)


def _keep_arguments(
    found: list[tuple[Tensor, ...]], _: nn.Module, arguments: tuple[Any, ...]
) -> None:
    found.append(arguments[:3])
