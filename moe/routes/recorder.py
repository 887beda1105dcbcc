"""From a decoder's forwards to the rows of a route file.

T rows, L MoE layers, K choices, B sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ..batch import Batch
from ..config.model import LayersConfig
from ..models.model import Model, ModelOutput
from ..routers.routing import Routing
from .format import Column, RouteHeader, make_header
from .identity import identity_of
from .rows import Array, Phase, Routes
from .sequence_numbers import SequenceNumbers
from .writer import RouteWriter


class OwnColumns(Protocol):
    """Columns of a caller's own, filled forward by forward."""

    columns: tuple[Column, ...]

    def values(self, num_rows: int) -> dict[str, Array]:
        """Return each column's values for the rows of the forward that has just ended."""
        ...


class Seen(NamedTuple):
    """What a forward leaves behind. Nothing is copied or waited for until it is made into rows."""

    ids_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]
    experts: list[Tensor]
    """``[T, K]`` of each MoE layer."""
    weights: list[Tensor]


def look_at(batch: Batch, routings: Sequence[Routing]) -> Seen:
    """Keep what a route file needs of a forward."""
    return Seen(
        batch.ids_T,
        batch.positions_T,
        batch.lengths,
        [routing.experts_TK for routing in routings],
        [routing.weights_TK.detach() for routing in routings],
    )


def rows_of(seen: Seen, sequences_B: Sequence[int], phases_B: Sequence[Phase], step: int) -> Routes:
    """Return a forward's rows on the host.

    ``sequences_B`` and ``phases_B`` are the number and the phase of each sequence of the batch.
    """
    lengths_B = np.array(seen.lengths)
    return Routes(
        tokens_N=_on_host(seen.ids_T).astype(np.int32),
        sequences_N=np.array(sequences_B, dtype=np.int64).repeat(lengths_B),
        positions_N=_on_host(seen.positions_T).astype(np.int32),
        steps_N=np.full(len(seen.ids_T), step, dtype=np.int64),
        phases_N=np.array(phases_B, dtype=np.uint8).repeat(lengths_B),
        experts_NLK=_stacked(seen.experts, torch.int32, -1),
        weights_NLK=_stacked(seen.weights, torch.float32, 0),
    )


def header_of(
    config: LayersConfig,
    decoder: Model | None = None,
    *,
    weights: bool = True,
    written_by: dict[str, Any],
    own: OwnColumns | None = None,
) -> RouteHeader:
    """Return the header of a model's route files; ``decoder`` if its weights stay as they are."""
    if config.moe is None:
        raise ConfigError("routes cannot be recorded, because the model has no experts.")
    return make_header(
        identity_of(config, decoder),
        config.moe_layers,
        config.moe.num_experts,
        config.moe.router.k,
        weights=weights,
        columns=() if own is None else own.columns,
        written_by=written_by,
    )


def see_forwards(
    decoder: Model, see: Callable[[Batch, list[Routing]], None]
) -> "torch.utils.hooks.RemovableHandle":
    """Show every forward of ``decoder`` to ``see`` until the handle is removed."""

    def hook(module: torch.nn.Module, arguments: tuple[Batch], output: ModelOutput) -> None:
        see(arguments[0], output.routings)

    return decoder.register_forward_hook(hook)


class ForwardRows:
    """Makes the rows of one forward after another.

    A sequence with a cache keeps its number from forward to forward: single rows that follow others
    were generated, the others are its prompt. A sequence without a cache is a separate text.
    """

    def __init__(self, own: OwnColumns | None = None) -> None:
        self._own = own
        self._numbers = SequenceNumbers()
        self._forwards = 0

    def __call__(self, batch: Batch, routings: list[Routing]) -> Routes:
        """Return the rows of the next forward."""
        sequences, phases = self._numbers.of(batch)
        rows = rows_of(look_at(batch, routings), sequences, phases, self._forwards)
        self._forwards += 1
        return rows if self._own is None else replace(rows, columns=self._own.values(len(rows)))


@contextmanager
def recording(
    decoder: Model, path: Path, written_by: str = "python", own: OwnColumns | None = None
) -> Iterator[RouteWriter]:
    """Record all forwards inside the ``with`` block into ``path``, which is replaced.

    Sequences are numbered as :class:`ForwardRows` says. ``own`` adds columns. Raises
    :class:`DataError` if the file cannot be written.
    """
    header = header_of(decoder.config, decoder, written_by={"program": written_by}, own=own)
    rows = ForwardRows(own)
    try:
        writer = RouteWriter(path, header)
        handle = see_forwards(decoder, lambda batch, routings: writer.add(rows(batch, routings)))
        try:
            yield writer
        finally:
            handle.remove()
            writer.close()
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); record into another file."
        ) from None


def _stacked(layers: Sequence[Tensor], dtype: torch.dtype, filling: int) -> Array:
    """Return ``[T, L, K]`` on the host; layers with fewer choices are filled up."""
    width = max(values_TK.shape[1] for values_TK in layers)
    same = []
    for values_TK in layers:
        missing = width - values_TK.shape[1]
        if missing:
            values_TK = torch.nn.functional.pad(values_TK, (0, missing), value=filling)
        same.append(values_TK.to(dtype))
    if same[0].device.type == "cpu":  # quicker than torch for the few rows of a decode step
        return np.stack([values_TK.numpy() for values_TK in same], axis=1)
    return _on_host(torch.stack(same, dim=1))


def _on_host(tensor: Tensor) -> Array:
    values: Array = tensor.cpu().numpy()
    return values
