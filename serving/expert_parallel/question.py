"""What a layer asks an owner: rows and their experts; and the lines that come back.

N rows of the layer, n of them for this owner, K choices, r routed rows of them, D model width.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ExpertReadError
from .channel import LostPeerError
from .link import PATIENCE_S, OwnerLink

ATTEMPTS = 2
"""Rows are sent again after one loss. After a second one the rows may be the reason."""


class Question:
    """Rows under way to one owner. The answer must be taken or dropped before the next question."""

    def __init__(
        self,
        link: OwnerLink,
        layer: int,
        x_ND: Tensor,
        experts_NK: npt.NDArray[np.int32],
        is_owners_NK: npt.NDArray[np.bool_],
    ) -> None:
        """Send the rows that chose an expert of the owner, each once."""
        self._link, self._layer = link, layer
        self._experts_NK, self._is_owners_NK = experts_NK, is_owners_NK
        rows_n = np.flatnonzero(is_owners_NK.any(axis=1))
        ids_nK = np.where(is_owners_NK, experts_NK, np.int32(-1))[rows_n]
        is_all = len(rows_n) == len(x_ND)
        self._x_nD = x_ND if is_all else x_ND.index_select(0, torch.from_numpy(rows_n))
        self._experts_nK = torch.from_numpy(ids_nK)
        self._number: int | None = None
        self._send()
        self.routed_r = torch.from_numpy(np.flatnonzero(is_owners_NK))
        """Numbers of the routed rows, as :class:`.LineWaves` counts them."""
        link.metrics.rows.inc(len(self.routed_r))

    def lines(self) -> Tensor:
        """Return the lines of the routed rows, ``[r, D]``, valid until the next question.

        Waits for an owner that is being replaced. Raises :class:`ExpertReadError` with the rows
        that cannot be computed.
        """
        for attempt in range(ATTEMPTS):
            try:
                if self._number is None:
                    if not self._link.is_back():
                        break
                    self._send()
                if self._number is not None:
                    return self._take(self._number)
            except LostPeerError as error:
                self._number = None
                self._link.lose(error)
                if attempt == ATTEMPTS - 1:
                    break
        raise self._error(
            f"owner {self._link.index} of the experts is lost, and no other has taken its place "
            f"within {PATIENCE_S:.0f} s to compute layer {self._layer}; try again later.",
            np.unique(self._experts_NK[self._is_owners_NK]).tolist(),
        )

    def drop(self) -> None:
        """Let the answer come and forget it."""
        if self._number is not None:
            try:
                self._link.answer(self._number, self._asked_at)
            except LostPeerError as error:
                self._link.lose(error)
            except ExpertReadError:
                pass  # another error is on its way already
            self._number = None

    def _send(self) -> None:
        self._asked_at = time.perf_counter()
        try:
            self._number = self._link.ask(self._layer, self._x_nD, self._experts_nK)
        except LostPeerError as error:
            self._link.lose(error)

    def _take(self, number: int) -> Tensor:
        try:
            payload = self._link.answer(number, self._asked_at)
        except ExpertReadError as error:
            self._number = None
            raise self._error(str(error), error.experts) from None
        self._number = None
        size = len(self.routed_r) * self._x_nD.shape[1]
        is_fp32 = len(payload) >= size * 4  # torch's lines have the type of the rows
        dtype = torch.float32 if is_fp32 else self._x_nD.dtype
        return payload[: size * dtype.itemsize].view(dtype).view(len(self.routed_r), -1)

    def _error(self, message: str, experts: Sequence[int]) -> ExpertReadError:
        """Return the error with the rows that chose the experts; none named = all rows sent."""
        hit_NK = self._is_owners_NK
        if experts:
            hit_NK = hit_NK & np.isin(self._experts_NK, experts)
        error = ExpertReadError(message, experts)
        error.rows = tuple(np.flatnonzero(hit_NK.any(axis=1)).tolist())
        return error
