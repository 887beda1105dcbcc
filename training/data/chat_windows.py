"""Conversations on disk, packed into windows.

A conversation of n tokens has n - 1 rows: each token but the last is read, and the next one is its
target if the assistant says it. A window holds whole conversations of at most L rows together; it
is not filled up, so that no row is padding. N rows, C conversations.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ...errors import DataError
from ...files import replaced
from .chat_mask import Encoded
from .shuffled import SizedItems

NO_TARGET = -100
"""Where the assistant says nothing: torch's ``ignore_index``."""

Ids = npt.NDArray[np.int32]


class ChatRows(NamedTuple):
    """Rows of some conversations, one after another. Moved between devices as a whole."""

    ids_N: Tensor
    """int64."""
    targets_N: Tensor
    """int64, :data:`NO_TARGET` where there is none."""
    lengths: tuple[int, ...]
    """Rows of each conversation."""


@dataclass(frozen=True, slots=True)
class ChatFacts:
    """What packing made of the conversations."""

    conversations: int
    windows: int
    rows: int
    targets: int
    cut: int
    """Conversations that are longer than a window and lose their end."""
    left_out: int
    """Conversations whose first window has no answer."""


class ChatWriter:
    """Collects conversations and writes them to a file at once."""

    def __init__(self) -> None:
        self._ids: list[Ids] = []
        self._targets: list[Ids] = []

    def add(self, encoded: Encoded) -> None:
        """Add a conversation."""
        ids = np.array(encoded.ids, dtype=np.int32)
        is_target = np.array(encoded.is_answer[1:])
        self._ids.append(ids[:-1])
        self._targets.append(np.where(is_target, ids[1:], np.int32(NO_TARGET)))

    def __len__(self) -> int:
        return len(self._ids)

    def write(self, path: Path, made_from: str) -> None:
        """Write the file whole or not at all; ``made_from`` says later if it is still right."""
        tensors = {
            "ids_N": np.concatenate(self._ids),
            "targets_N": np.concatenate(self._targets),
            "lengths_C": np.array([len(ids) for ids in self._ids], dtype=np.int32),
        }
        with replaced(path) as unfinished:
            save_file(tensors, unfinished, metadata={"made_from": made_from})


class ChatWindows(SizedItems):
    """The windows of a file of conversations, in a fresh random order each epoch."""

    def __init__(self, path: Path, length: int, batch: int, seed: int, name: str) -> None:
        """``length`` is L, ``batch`` the windows of a global batch; errors say ``name``."""
        with safe_open(path, "np") as file:
            self._ids_N = file.get_tensor("ids_N")
            self._targets_N = file.get_tensor("targets_N")
            lengths_C = file.get_tensor("lengths_C")
        self.identity = self._hash(lengths_C)
        self._windows = self._pack(lengths_C, length)
        if not self._windows:
            raise DataError(
                f"the {name} data have no answer within train.sequence_length = {length} tokens; "
                "raise it."
            )
        rows_W = [sum(last - first for first, last in spans) for spans in self._windows]
        super().__init__(rows_W, batch, seed)
        self._targets_W = [int((self.rows([w]).targets_N >= 0).sum()) for w in range(len(self))]
        self.facts = self._count(lengths_C, length)

    def rows(self, windows: list[int]) -> ChatRows:
        """Return the conversations of ``windows``."""
        spans = [span for window in windows for span in self._windows[window]]
        ids = [self._ids_N[first:last] for first, last in spans] or [self._ids_N[:0]]
        targets = [self._targets_N[first:last] for first, last in spans] or [self._ids_N[:0]]
        return ChatRows(
            torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            tuple(last - first for first, last in spans),
        )

    def num_targets(self, step: int) -> int:
        """Return the targets of the global batch of ``step``."""
        return sum(self._targets_W[window] for window in self.at(step, range(self._batch)))

    def token_counts(self) -> list[int]:
        """Return how often each id is read."""
        return np.bincount(self._ids_N).tolist()

    def _pack(self, lengths_C: Ids, length: int) -> list[list[tuple[int, int]]]:
        """Return the spans of rows of each window: conversations in order, while they fit."""
        windows: list[list[tuple[int, int]]] = []
        room = 0
        ends = np.cumsum(lengths_C)
        for end, whole in zip(ends.tolist(), lengths_C.tolist(), strict=True):
            first, kept = end - whole, min(whole, length)
            if not (self._targets_N[first : first + kept] >= 0).any():
                continue
            if kept > room:
                windows.append([])
                room = length
            windows[-1].append((first, first + kept))
            room -= kept
        return windows

    def _count(self, lengths_C: Ids, length: int) -> ChatFacts:
        num_kept = sum(map(len, self._windows))
        return ChatFacts(
            conversations=len(lengths_C),
            windows=len(self),
            rows=self.epoch_rows,
            targets=sum(self._targets_W),
            cut=int((lengths_C > length).sum()),
            left_out=len(lengths_C) - num_kept,
        )

    def _hash(self, lengths_C: Ids) -> str:
        digest = hashlib.sha256()
        for array in (self._ids_N, self._targets_N, lengths_C):
            digest.update(array.tobytes())
        return digest.hexdigest()
