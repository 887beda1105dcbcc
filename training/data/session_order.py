"""Sessions on disk as tokens, in the order of training.

N tokens of histories, B rows, I items of a session, L codes of an item, P pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ...files import replaced
from ...moe.items.table import ItemTable
from .session_rows import LoggedSessions
from .shuffled import SizedItems


class SessionRows(NamedTuple):
    """Histories and the sessions that followed. Moved between devices as a whole."""

    source_N: Tensor
    """int64: the tokens of the histories' codes, one history after another."""
    lengths: tuple[int, ...]
    """Tokens of each history."""
    targets_BIL: Tensor
    """int64: the tokens of the sessions' codes."""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a run knows of its sessions."""

    sessions: int
    tokens: int
    """Of the histories, after cutting, and of what the decoder reads."""
    cut: int
    """Histories that are longer than ``train.sequence_length`` and lose their oldest items."""


def write_sessions(path: Path, sessions: LoggedSessions, made_from: str) -> None:
    """Write the file whole or not at all; ``made_from`` says later if it is still right."""
    tensors = {name: np.ascontiguousarray(value) for name, value in sessions._asdict().items()}
    with replaced(path) as unfinished:
        save_file(tensors, unfinished, metadata={"made_from": made_from})


def read_sessions(path: Path) -> LoggedSessions:
    """Return the sessions of a file that :func:`write_sessions` wrote."""
    with safe_open(path, "np") as file:
        return LoggedSessions(*(file.get_tensor(name) for name in LoggedSessions._fields))


class SessionOrder(SizedItems):
    """Sessions in a fresh random order each epoch."""

    def __init__(
        self, sessions: LoggedSessions, table: ItemTable, length: int, batch: int, seed: int
    ) -> None:
        """``length`` is the most tokens of a history, ``batch`` the rows of a global batch."""
        self.sessions, self.table = sessions, table
        self._most = length // table.num_levels
        """Most items of a history."""
        whole_C = sessions.ends_C - sessions.starts_C
        self._items_C = np.minimum(whole_C, self._most)
        decoded = sessions.items_CI.shape[1] * (table.num_levels + 1) - 1
        rows_C: list[int] = (self._items_C * table.num_levels + decoded).tolist()
        """Tokens of each history, and of what is decoded."""
        super().__init__(rows_C, batch, seed)
        digest = hashlib.sha256(f"{self._most} {table.text()}".encode())
        for array in sessions:
            digest.update(np.ascontiguousarray(array).tobytes())
        self.identity = digest.hexdigest()
        self.facts = SessionFacts(len(self), self.epoch_rows, int((whole_C > self._most).sum()))

    def rows(self, chosen: Sequence[int]) -> SessionRows:
        """Return the rows of some sessions."""
        histories = [self.history(one) for one in chosen]
        flat = torch.tensor([item for own in histories for item in own], dtype=torch.int64)
        items_BI = torch.from_numpy(self.sessions.items_CI[list(chosen)])
        return SessionRows(
            self.table.tokens(flat).reshape(-1),
            tuple(len(own) * self.table.num_levels for own in histories),
            self.table.tokens(items_BI),
        )

    def history(self, one: int) -> list[int]:
        """Return the items of the history of a session that a run reads: the newest."""
        end, count = self.sessions.ends_C[one], self._items_C[one]
        return self.sessions.history_P[end - count : end].tolist()

    def token_counts(self) -> list[int]:
        """Return how often each token occurs in histories and in what the decoder reads."""
        own = self.sessions
        read_N = np.concatenate([own.history_P, own.items_CI.reshape(-1)])
        counts_V = torch.bincount(
            self.table.tokens(torch.from_numpy(read_N)).reshape(-1), minlength=self.table.vocabulary
        )
        counts_V[self.table.begin] = own.items_CI.size
        return counts_V.tolist()
