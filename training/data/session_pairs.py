"""Pairs of generated sessions: for some training rows, a better one and a worse one.

P pairs, I items of a session.
"""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import DataError
from ...files import replaced
from ..formats.sessions import AlignmentConfig
from .session_order import SessionOrder

IDENTITY = "training_data"


class SessionPairs(NamedTuple):
    """Pairs with what the model that generated them thought of them."""

    sessions_P: Tensor
    """int64: the training session of each pair, in the order of the log; none is there twice."""
    items_P2I: Tensor
    """int64: places of the items of the better session, then of the worse one."""
    reference_P2: Tensor
    """fp64: their log-probabilities under the model that generated them."""
    rewards_P2: Tensor
    """fp64: what the reward model gave them."""


def write_pairs(path: Path, pairs: SessionPairs, order: SessionOrder) -> None:
    """Write the file whole or not at all; only runs on the same sessions will take it."""
    with replaced(path) as unfinished:
        tensors = {name: tensor.contiguous() for name, tensor in pairs._asdict().items()}
        save_file(tensors, unfinished, metadata={IDENTITY: order.identity})


def open_pairs(config: AlignmentConfig | None, order: SessionOrder) -> SessionPairs | None:
    """Return the pairs that a run learns, if it learns any.

    Raises :class:`DataError` for a file without pairs, and for pairs of other sessions.
    """
    if config is None or config.weight == 0:
        return None
    try:
        with safe_open(config.pairs, "pt") as file:
            identity = (file.metadata() or {}).get(IDENTITY)
            pairs = SessionPairs(*(file.get_tensor(name) for name in SessionPairs._fields))
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"data.alignment.pairs is {config.pairs!r}, which has no pairs ({error}); give a file "
            "that moeyard align wrote."
        ) from None
    if identity != order.identity:
        raise DataError(
            f"data.alignment.pairs is {config.pairs!r}, whose pairs are of other sessions; write "
            "them again for this data section."
        )
    return pairs
