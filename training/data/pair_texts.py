"""Pairs of source and target texts on disk, and in the order of training. N ids, C pairs."""

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

from ...files import replaced
from .shuffled import SizedItems

Ids = npt.NDArray[np.uint32]


class PairRows(NamedTuple):
    """The rows of some pairs, one text after another. Moved between devices as a whole."""

    source_ids_S: Tensor
    """int64, with the end of each text."""
    target_ids_T: Tensor
    """int64, with the end of each text: what the model should write."""
    source_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairFacts:
    """What a run knows of its pairs."""

    pairs: int
    source_rows: int
    """Tokens with the end of each text, after cutting."""
    target_rows: int
    cut: int
    """Pairs with a text longer than ``train.sequence_length``, which loses its end."""


class PairWriter:
    """Collects tokenized pairs and writes them to a file at once."""

    def __init__(self) -> None:
        self._ids: dict[str, list[Ids]] = {"source": [], "target": []}

    def add(self, source: Ids, target: Ids) -> None:
        """Add a pair without the ends of its texts."""
        self._ids["source"].append(source)
        self._ids["target"].append(target)

    def write(self, path: Path, made_from: str) -> None:
        """Write the file whole or not at all; ``made_from`` says later if it is still right."""
        tensors = {}
        for side, ids in self._ids.items():
            tensors[f"{side}_N"] = np.concatenate(ids).astype(np.int32)
            tensors[f"{side}_lengths_C"] = np.array([len(one) for one in ids], dtype=np.int32)
        with replaced(path) as unfinished:
            save_file(tensors, unfinished, metadata={"made_from": made_from})


class _Texts:
    """The texts of one side."""

    def __init__(self, ids_N: npt.NDArray[np.int32], lengths_C: npt.NDArray[np.int32]) -> None:
        self.ids_N, self.lengths_C = ids_N, lengths_C
        self._ends_C = np.cumsum(lengths_C.astype(np.int64))

    def rows_C(self, most: int) -> list[int]:
        """Return the rows of each text with its end, at most ``most``."""
        rows: list[int] = np.minimum(self.lengths_C.astype(np.int64) + 1, most).tolist()
        return rows

    def of(self, text: int, most: int, end: int) -> list[int]:
        """Return the ids of a text with ``end`` behind them, ``most`` in all."""
        stop = int(self._ends_C[text])
        ids: list[int] = self.ids_N[stop - int(self.lengths_C[text]) : stop].tolist()
        return [*ids[: most - 1], end]


class PairTexts(SizedItems):
    """The pairs of a file, in a fresh random order each epoch."""

    def __init__(self, path: Path, eos_id: int, length: int, batch: int, seed: int) -> None:
        """``length`` is the most rows of a text, ``batch`` the pairs of a global batch."""
        with safe_open(path, "np") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._source = _Texts(found["source_N"], found["source_lengths_C"])
        self._target = _Texts(found["target_N"], found["target_lengths_C"])
        self._eos_id, self._length = eos_id, length
        source_rows_C = self._source.rows_C(length)
        self.target_rows_C = self._target.rows_C(length)
        """Rows of each pair's target."""
        pairs = zip(source_rows_C, self.target_rows_C, strict=True)
        super().__init__([source + target for source, target in pairs], batch, seed)
        digest = hashlib.sha256(f"{eos_id}".encode())
        for name in sorted(found):
            digest.update(found[name].tobytes())
        self.identity = digest.hexdigest()
        longest_C = np.maximum(self._source.lengths_C, self._target.lengths_C)
        self.facts = PairFacts(
            len(self),
            sum(source_rows_C),
            sum(self.target_rows_C),
            int((longest_C >= length).sum()),
        )

    def rows(self, pairs: list[int]) -> PairRows:
        """Return the rows of ``pairs``."""
        how = (self._length, self._eos_id)
        sources = [self._source.of(pair, *how) for pair in pairs]
        targets = [self._target.of(pair, *how) for pair in pairs]
        return PairRows(
            torch.tensor([one for ids in sources for one in ids], dtype=torch.int64),
            torch.tensor([one for ids in targets for one in ids], dtype=torch.int64),
            tuple(map(len, sources)),
            tuple(map(len, targets)),
        )

    def token_counts(self) -> list[int]:
        """Return how often each id occurs in sources and targets, ends included."""
        ids_N = np.concatenate([self._source.ids_N, self._target.ids_N])
        counts = np.bincount(ids_N, minlength=self._eos_id + 1)
        counts[self._eos_id] += 2 * len(self)
        found: list[int] = counts.tolist()
        return found
