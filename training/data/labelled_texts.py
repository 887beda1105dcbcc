"""Texts with labels on disk, and in the order of training. N ids, C texts."""

import hashlib
import json
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
from ...moe.folders.text_marks import TextMarks
from .shuffled import SizedItems


class TextRows(NamedTuple):
    """The rows of some texts, one after another. Moved between devices as a whole."""

    ids_N: Tensor
    """int64."""
    labels_C: Tensor
    """int64: index of each text's label among those of the data."""
    lengths: tuple[int, ...]
    """Rows of each text."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What a run knows of its texts."""

    texts: int
    rows: int
    """Tokens with the marks around texts, after cutting."""
    cut: int
    """Texts that are longer than ``train.sequence_length`` and lose their end."""


class LabelledWriter:
    """Collects tokenized texts and writes them to a file at once."""

    def __init__(self) -> None:
        self._ids: list[npt.NDArray[np.uint32]] = []
        self.labels: list[str] = []

    def add(self, ids: npt.NDArray[np.uint32], label: str) -> None:
        """Add a text without marks."""
        self._ids.append(ids)
        self.labels.append(label)

    def write(self, path: Path, labels: list[str], made_from: str) -> None:
        """Write the file whole or not at all.

        ``labels`` are those of the data in order; ``made_from`` says later if it is still right.
        """
        index = {label: number for number, label in enumerate(labels)}
        tensors = {
            "ids_N": np.concatenate(self._ids).astype(np.int32),
            "lengths_C": np.array([len(ids) for ids in self._ids], dtype=np.int32),
            "labels_C": np.array([index[label] for label in self.labels], dtype=np.int32),
        }
        metadata = {"made_from": made_from, "labels": json.dumps(labels)}
        with replaced(path) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)


class LabelledTexts(SizedItems):
    """The texts of a file, in a fresh random order each epoch."""

    def __init__(self, path: Path, marks: TextMarks, length: int, batch: int, seed: int) -> None:
        """``length`` is the most rows of a text, ``batch`` the texts of a global batch."""
        with safe_open(path, "np") as file:
            self._ids_N = file.get_tensor("ids_N")
            lengths_C = file.get_tensor("lengths_C")
            self._labels_C = file.get_tensor("labels_C")
            self.labels: list[str] = json.loads((file.metadata() or {})["labels"])
        self._marks, self._length = marks, length
        self._ends_C = np.cumsum(lengths_C.astype(np.int64))
        self._starts_C = self._ends_C - lengths_C
        whole = lengths_C + len(marks.before) + len(marks.after)
        super().__init__(np.minimum(whole, length).tolist(), batch, seed)
        digest = hashlib.sha256(json.dumps([self.labels, marks]).encode())
        for array in (self._ids_N, lengths_C, self._labels_C):
            digest.update(array.tobytes())
        self.identity = digest.hexdigest()
        self.facts = TextFacts(len(self), self.epoch_rows, int((whole > length).sum()))

    def rows(self, texts: list[int]) -> TextRows:
        """Return the rows of ``texts``."""
        ids: list[int] = []
        for text in texts:
            own = self._ids_N[self._starts_C[text] : self._ends_C[text]].tolist()
            ids += self._marks.around(own, self._length)
        labels_C = torch.from_numpy(self._labels_C[texts].astype(np.int64))
        return TextRows(
            torch.tensor(ids, dtype=torch.int64), labels_C, tuple(self.num_rows_of(texts))
        )

    def token_counts(self) -> list[int]:
        """Return how often each id occurs, the marks around each text included."""
        marks = np.array([*self._marks.before, *self._marks.after], dtype=np.int64)
        counts = np.bincount(self._ids_N, minlength=int(marks.max()) + 1)
        np.add.at(counts, marks, len(self))
        return counts.tolist()
