"""One forward of several requests. A failure ends as few of them as possible.

T rows of a sequence, N of them whose scores are wanted, R those of all sequences, D model width,
V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...errors import ExpertReadError, RequestError
from ...kernels.values.memory import is_out_of_memory
from ...moe.models.decoder import Decoder
from ...moe.routers.routing import Routing
from .drafts.rows import TextRows, run_rows
from .sequence import Sequence

RETRY_AFTER_S = 5
"""``Retry-After`` for a temporary failure of a disk or of memory."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """A forward's result for one sequence."""

    sequence: Sequence
    hidden_TD: Tensor
    """Of the rows it has just read."""
    logits_NV: Tensor
    """Scores of its next token, and of those after each drafted one; none while it still reads its
    prompt."""


Ids = tuple[int, ...]
Failure = tuple[Sequence, RequestError]


@dataclass(slots=True)
class Step:
    """The outcome of one step: results, their routings, and failed sequences."""

    results: list[StepResult]
    routings: list[list[Routing]]
    """Of each forward that went through."""
    failures: list[Failure]


def run_step(decoder: Decoder, sequences: Items[Sequence], prefill_chunk: int) -> Step:
    """Take sequences one step further.

    A sequence fails when its cache cannot grow, when one of its rows chose an expert that cannot
    be read, or when there is no memory for it even alone. The others run again from unchanged
    caches, and a sequence's bits do not depend on which others run with it. Drafted rows never make
    a sequence fail: they are left out first.
    """
    step = Step([], [], [])
    groups = [_make_room(sequences, prefill_chunk, step.failures)]
    while groups:
        group = groups.pop(0)
        if not group:
            continue
        lengths = [sequence.cache.length for sequence in group]
        ids = [sequence.next_ids(prefill_chunk) for sequence in group]
        try:
            results, routings = _forward(decoder, group, ids)
        except Exception as error:
            again, failures = _without_drafts(group, error) or _divide(group, ids, error)
        else:
            step.results += results
            step.routings.append(routings)
            continue
        # After the except clause: the error keeps the forward's tensors alive until then.
        for sequence, length in zip(group, lengths, strict=True):
            sequence.cache.length = length
        groups[:0] = again
        step.failures += failures
    return step


def out_of_memory() -> RequestError:
    """Return the error of a request that there is no memory for."""
    return _unavailable(
        "the server has no memory left for this request; try again later or shorten it."
    )


def _make_room(
    sequences: Items[Sequence], prefill_chunk: int, failures: list[Failure]
) -> list[Sequence]:
    """Grow the caches; return the sequences that have room."""
    able = []
    for sequence in sequences:
        if not _has_room(sequence, prefill_chunk):
            sequence.drop_drafts()
            if not _has_room(sequence, prefill_chunk):
                failures.append((sequence, out_of_memory()))
                continue
        able.append(sequence)
    return able


def _has_room(sequence: Sequence, prefill_chunk: int) -> bool:
    """Grow the cache; say whether there was memory for it."""
    try:
        sequence.cache.reserve(len(sequence.next_ids(prefill_chunk)))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _forward(
    decoder: Decoder, sequences: list[Sequence], ids: list[Ids]
) -> tuple[list[StepResult], list[Routing]]:
    texts = [
        TextRows(s.cache, own, s.request.adapter, len(s.drafted))
        for s, own in zip(sequences, ids, strict=True)
    ]
    output = run_rows(decoder, texts)
    chunks = output.hidden_TD.split([len(i) for i in ids])
    counts = [0 if s.is_prefilling else 1 + len(s.drafted) for s in sequences]
    wanted = [chunk[len(chunk) - n :] for chunk, n in zip(chunks, counts, strict=True) if n]
    logits_RV = decoder.logits(torch.cat(wanted)) if wanted else output.hidden_TD[:0]
    results = [
        StepResult(*result)
        for result in zip(sequences, chunks, logits_RV.split(counts), strict=True)
    ]
    return results, output.routings


def _without_drafts(
    sequences: list[Sequence], error: Exception
) -> tuple[list[list[Sequence]], list[Failure]] | None:
    """Return the same group again without its drafted rows, or None if it had none."""
    if not isinstance(error, ExpertReadError) and not is_out_of_memory(error):
        raise error
    if not any(s.drafted for s in sequences):
        return None
    for sequence in sequences:
        sequence.drop_drafts()
    return [sequences], []


def _divide(
    sequences: list[Sequence], ids: list[Ids], error: Exception
) -> tuple[list[list[Sequence]], list[Failure]]:
    """Return which sequences to run again, in groups, and which end because of ``error``."""
    if isinstance(error, ExpertReadError):
        reason = _unavailable(str(error))
        ends = list(accumulate(len(i) for i in ids))
        hit = {bisect_right(ends, row) for row in error.rows}
        assert hit, "a read failed for an expert that no row chose"
        again = [s for index, s in enumerate(sequences) if index not in hit]
        return [again], [(sequences[index], reason) for index in sorted(hit)]
    if not is_out_of_memory(error):
        raise error
    if len(sequences) == 1:
        return [], [(sequences[0], out_of_memory())]
    # It is unknown whose rows exceeded the memory, so each half is tried.
    middle = len(sequences) // 2
    return [sequences[:middle], sequences[middle:]], []


def _unavailable(message: str) -> RequestError:
    return RequestError(message, code="unavailable", status=503, retry_after_s=RETRY_AFTER_S)
