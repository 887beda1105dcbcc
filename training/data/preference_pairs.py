"""Preference pairs on disk, cut to length, in the order of training.

A conversation of n tokens has n - 1 rows: each token but the last is read, and the next one is its
target if it belongs to the answer. The file has whole conversations, chosen and rejected in turn.
N rows, C conversations, S sequences of a batch.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import DataError
from .shuffled import SizedItems

Span = tuple[int, int]


class PairRows(NamedTuple):
    """Rows of some pairs, one conversation after another. Moved between devices as a whole."""

    ids_N: Tensor
    """int64."""
    targets_N: Tensor
    """int64, negative where there is none."""
    lengths: tuple[int, ...]
    """Rows of each conversation: chosen and rejected of the first pair, of the second, ..."""


@dataclass(frozen=True, slots=True)
class PairFacts:
    """What cutting made of the pairs."""

    pairs: int
    """Those that are left."""
    rows: int
    targets: int
    cut_prompts: int
    """Pairs that lose the beginning of their prompt."""
    cut_answers: int
    """Pairs of which an answer alone is too long, and loses its end."""
    equal: int
    """Pairs whose sides are the same, from the start or when cut; they are left out."""
    no_answer: int
    """Pairs of which a side has no token to compare within the length; they are left out."""


class PreferencePairs(SizedItems):
    """The pairs of a file, in a fresh random order each epoch."""

    def __init__(self, path: Path, length: int, batch: int, seed: int, name: str) -> None:
        """``length`` is the most rows of a conversation, ``batch`` the pairs of a global batch;
        errors say ``name``."""
        with safe_open(path, "np") as file:
            self._ids_N: npt.NDArray[np.int32] = file.get_tensor("ids_N")
            self._targets_N: npt.NDArray[np.int32] = file.get_tensor("targets_N")
            lengths_C = file.get_tensor("lengths_C")
        digest = hashlib.sha256()
        for array in (self._ids_N, self._targets_N, lengths_C):
            digest.update(array.tobytes())
        self.identity = digest.hexdigest()
        """Hash of the whole pairs, whatever ``length``."""
        self._pairs: list[tuple[Span, Span]] = []
        self.facts = self._cut_all(lengths_C, length)
        if not self._pairs:
            raise DataError(
                f"the {name} data have no pair whose answers differ within train.sequence_length "
                f"= {length} tokens; raise it, or give other pairs."
            )
        rows_P = [sum(last - first for first, last in spans) for spans in self._pairs]
        super().__init__(rows_P, batch, seed)

    def until(self, step: int) -> list[int]:
        """Return the pairs that steps before ``step`` train on, each once, in their first order."""
        return [self._order.item(place) for place in range(min(step * self._batch, len(self)))]

    def rows(self, pairs: list[int]) -> PairRows:
        """Return the conversations of ``pairs``."""
        spans = [span for pair in pairs for span in self._pairs[pair]]
        ids = [self._ids_N[first:last] for first, last in spans] or [self._ids_N[:0]]
        targets = [self._targets_N[first:last] for first, last in spans] or [self._ids_N[:0]]
        return PairRows(
            torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            tuple(last - first for first, last in spans),
        )

    def token_counts(self) -> list[int]:
        """Return how often each id is read."""
        return np.bincount(self._ids_N).tolist()

    def _cut_all(self, lengths_C: npt.NDArray[np.int32], length: int) -> PairFacts:
        """Cut every pair and keep those whose answers differ; return the facts."""
        ends = np.cumsum(lengths_C.astype(np.int64))
        whole = list(zip((ends - lengths_C).tolist(), ends.tolist(), strict=True))
        count = {"rows": 0, "targets": 0, "cut_prompts": 0, "cut_answers": 0}
        count |= {"equal": 0, "no_answer": 0}
        for pair in zip(whole[::2], whole[1::2], strict=True):
            dropped, spans = self._cut(pair, length)
            targets = [self._num_targets(span) for span in spans]
            if self._are_equal(*spans):
                count["equal"] += 1
                continue
            if 0 in targets:  # it would weigh as a pair that the model cannot tell apart
                count["no_answer"] += 1
                continue
            self._pairs.append(spans)
            count["cut_prompts"] += dropped > 0
            count["cut_answers"] += max(b - a for a, b in pair) - dropped > length
            count["rows"] += sum(b - a for a, b in spans)
            count["targets"] += sum(targets)
        return PairFacts(pairs=len(self._pairs), **count)

    def _cut(self, pair: tuple[Span, Span], length: int) -> tuple[int, tuple[Span, Span]]:
        """Return what a pair loses of its prompt, and the spans of its sides.

        Both sides lose the same first rows, so that they keep one prompt. The row that predicts an
        answer's first token stays.
        """
        prompt = min(int(np.argmax(self._targets_N[a:b] >= 0)) for a, b in pair)
        dropped = min(prompt, max(0, max(b - a for a, b in pair) - length))
        first, second = ((a + dropped, min(b, a + dropped + length)) for a, b in pair)
        return dropped, (first, second)

    def _num_targets(self, span: Span) -> int:
        return int((self._targets_N[slice(*span)] >= 0).sum())

    def _are_equal(self, one: Span, other: Span) -> bool:
        sides = [
            (self._ids_N[slice(*span)].tobytes(), self._targets_N[slice(*span)].tobytes())
            for span in (one, other)
        ]
        return sides[0] == sides[1]
