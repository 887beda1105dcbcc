"""Rows of a route file in memory.

N rows, L MoE layers, K choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Phase(IntEnum):
    """What a row was computed for."""

    TRAIN = 0
    PREFILL = 1
    """A token of a prompt, or of a text that was only scored."""
    DECODE = 2
    """A token that the model generated, read to choose the next one."""


@dataclass(frozen=True, slots=True)
class Routes:
    """The choices of some rows, and what the rows were.

    In training a row is named by step, sequence and position, elsewhere by sequence and position.
    """

    tokens_N: Array
    """int32 token ids."""
    sequences_N: Array
    """int64: the number of the row's request; of its text or document in training."""
    positions_N: Array
    """int32: the row's place in its sequence."""
    steps_N: Array
    """int64: training step as in ``metrics.jsonl``; elsewhere the number of the forward."""
    phases_N: Array
    """uint8, :class:`Phase`."""
    experts_NLK: Array
    """int32 logical ids in the order of the router's choice; -1 = none."""
    weights_NLK: Array | None = None
    """float32; None if they were not recorded."""
    columns: dict[str, Array] = field(default_factory=dict)
    """Columns of your own, ``[N, ...]``."""

    def __len__(self) -> int:
        return len(self.tokens_N)

    def select(self, chosen: Array | slice) -> "Routes":
        """Return the rows of an index array, a mask or a slice."""
        return Routes(
            **{name: getattr(self, name)[chosen] for name in PLAIN},
            weights_NLK=None if self.weights_NLK is None else self.weights_NLK[chosen],
            columns={name: values[chosen] for name, values in self.columns.items()},
        )


PLAIN = tuple(f.name for f in fields(Routes))[:6]
"""The fields that every row has."""


def joined(parts: Sequence[Routes]) -> Routes:
    """Return all rows of ``parts``, at least one, which have the same columns.

    Where they differ in K, the narrower get choices of -1 with weight 0.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(part.experts_NLK.shape[2] for part in parts)
    given = [part.weights_NLK for part in parts if part.weights_NLK is not None]
    own = parts[0].columns
    return Routes(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in PLAIN[:-1]},
        experts_NLK=np.concatenate([_widened(part.experts_NLK, width, -1) for part in parts]),
        weights_NLK=np.concatenate([_widened(w, width, 0) for w in given]) if given else None,
        columns={name: _joined_column([part.columns[name] for part in parts]) for name in own},
    )


def _joined_column(values: Sequence[Array]) -> Array:
    width = max((v.shape[2] for v in values if v.ndim == 3), default=0)
    return np.concatenate([_widened(v, width, 0) if v.ndim == 3 else v for v in values])


def _widened(values_NLK: Array, width: int, filling: int) -> Array:
    missing = width - values_NLK.shape[2]
    if missing == 0:
        return values_NLK
    return np.pad(values_NLK, ((0, 0), (0, 0), (0, missing)), constant_values=filling)
