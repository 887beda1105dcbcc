"""Replay recorded routes: routers visit recorded experts, and everything else is computed anew.

Only the choice is replaced. Weights are the model's own scores at the recorded experts, normalised
as the router does it, with gradient (rollout routing replay, R3). Recompute replays, too.

N recorded rows, T rows of a batch, B sequences, L MoE layers, K choices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..batch import Batch
from ..config.model import LayersConfig
from ..models.model import Model, ModelOutput
from .rows import Array, Routes


class RouteIndex:
    """Finds recorded rows by sequence and position. Where one was recorded twice, the last counts.

    Routes of training must be of one step.
    """

    def __init__(self, routes: Routes) -> None:
        if not len(routes):
            raise DataError("the routes have no rows; give those of this batch.")
        self._routes = routes
        keys_N = _keys(routes.sequences_N, routes.positions_N)
        self._order_N = np.argsort(keys_N, kind="stable")
        self._keys_N = keys_N[self._order_N]

    def experts_of(self, batch: Batch, sequences_B: Sequence[int]) -> Tensor:
        """Return the recorded experts of a batch's rows, int32 ``[T, L, K]``.

        ``sequences_B`` are the recorded numbers of the batch's sequences. Raises
        :class:`DataError` for rows that were not recorded, and for other tokens.
        """
        sequences_T = np.repeat(np.array(sequences_B, dtype=np.int64), batch.lengths)
        positions_T = batch.positions_T.cpu().numpy()
        keys_T = _keys(sequences_T, positions_T)
        places_T = np.searchsorted(self._keys_N, keys_T, side="right") - 1
        missing_T = (places_T < 0) | (self._keys_N[places_T] != keys_T)
        if missing_T.any():
            row = int(missing_T.argmax())
            raise DataError(
                f"the routes have no row for position {positions_T[row]} of sequence "
                f"{sequences_T[row]}; record it, or replay another batch."
            )
        rows_T = self._order_N[places_T]
        recorded_T, ids_T = self._routes.tokens_N[rows_T], batch.ids_T.cpu().numpy()
        if (recorded_T != ids_T).any():
            row = int((recorded_T != ids_T).argmax())
            raise DataError(
                f"the routes have token {recorded_T[row]} at position {positions_T[row]} of "
                f"sequence {sequences_T[row]}, but the batch has {ids_T[row]}; give the routes of "
                "this text."
            )
        return torch.from_numpy(self._routes.experts_NLK[rows_T])


def with_routes(batch: Batch, config: LayersConfig, experts_TLK: Tensor) -> Batch:
    """Return the batch with recorded experts, int ``[T, L, K]`` with -1 for none.

    Raises :class:`DataError` if they do not fit the batch or the model.
    """
    num_experts = config.moe.num_experts if config.moe is not None else 0
    expected = (len(batch.ids_T), len(config.moe_layers))
    if experts_TLK.ndim != 3 or experts_TLK.shape[:2] != expected:
        raise DataError(
            f"the routes have shape {list(experts_TLK.shape)}; give [rows, MoE layers, choices] = "
            f"[{expected[0]}, {expected[1]}, K]."
        )
    if experts_TLK.numel():
        lowest, highest = (int(bound) for bound in experts_TLK.aminmax())
        if lowest < -1 or highest >= num_experts:
            raise DataError(
                f"the routes name expert {lowest if lowest < -1 else highest}, but there are "
                f"{num_experts}; ids go from 0 to {num_experts - 1}, and -1 is none."
            )
    here = experts_TLK.to(batch.ids_T.device, torch.int32)
    by_layer = zip(config.moe_layers, here.unbind(dim=1), strict=True)
    return replace(batch, routes={layer: ids.contiguous() for layer, ids in by_layer})


def replay(decoder: Model, batch: Batch, routes: Routes, sequences_B: Sequence[int]) -> ModelOutput:
    """Run a forward with recorded routes; ``sequences_B`` are the numbers of its sequences.

    Raises :class:`DataError` unless the routes have every row, with the same token.
    """
    experts_TLK = RouteIndex(routes).experts_of(batch, sequences_B)
    output: ModelOutput = decoder(with_routes(batch, decoder.config, experts_TLK))
    return output


@contextmanager
def replaying(decoder: Model, experts_of: Callable[[Batch], Tensor | None]) -> Iterator[None]:
    """Replay in every forward of ``decoder`` inside the ``with`` block.

    ``experts_of`` returns the experts of a batch, ``[T, L, K]``; None = the routers choose.
    """

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Batch]:
        (batch,) = arguments
        experts_TLK = experts_of(batch)
        if experts_TLK is None:
            return (batch,)
        return (with_routes(batch, decoder.config, experts_TLK),)

    handle = decoder.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _keys(sequences_N: Array, positions_N: Array) -> Array:
    keys: Array = (sequences_N.astype(np.int64) << 32) | positions_N.astype(np.int64)
    return keys
