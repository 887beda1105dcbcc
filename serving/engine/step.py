"""One forward of several requests. A failure ends as few of them as possible.

T rows of a sequence, N those of them that a token follows, R such rows of all sequences, D model
width, V vocabulary.
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
from ...moe.models.draft_rows import TextRows, run_rows
from ...moe.routers.routing import Routing
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
    """Scores of its next token, and of those after each drafted one; none while it has not read all
    that is known of its text."""


Ids = tuple[int, ...]
Turn = tuple[Sequence, Ids]
"""A sequence and the ids that it reads in this step; its cache has room for them."""
Failure = tuple[Sequence, RequestError]


@dataclass(slots=True)
class Step:
    """The outcome of one step: results, their routings, and failed sequences."""

    results: list[StepResult]
    routings: list[list[Routing]]
    """Of each forward that went through."""
    failures: list[Failure]


def run_step(decoder: Decoder, turns: Items[Turn]) -> Step:
    """Take sequences one step further.

    A sequence fails when one of its rows chose an expert that cannot be read, or when there is no
    memory for it even alone. The others run again from unchanged caches, and a sequence's bits do
    not depend on which others run with it. Drafted rows never make a sequence fail: they are left
    out first.
    """
    step = Step([], [], [])
    groups = [list(turns)]
    while groups:
        group = groups.pop(0)
        if not group:
            continue
        lengths = [sequence.cache.length for sequence, _ in group]
        try:
            results, routings = _forward(decoder, group)
        except Exception as error:
            again, failures = _without_drafts(group, error) or _divide(group, error)
        else:
            step.results += results
            step.routings.append(routings)
            continue
        # After the except clause: the error keeps the forward's tensors alive until then.
        for (sequence, _), length in zip(group, lengths, strict=True):
            sequence.cache.length = length
        groups[:0] = again
        step.failures += failures
    return step


def request_error(error: Exception) -> RequestError:
    """Return what ends a request for which ``error`` was raised, or raise it: it is our bug."""
    if isinstance(error, RequestError):
        return error
    if not is_out_of_memory(error):
        raise error
    return _out_of_memory()


def _out_of_memory() -> RequestError:
    return _unavailable(
        "the server has no memory left for this request; try again later or shorten it."
    )


def _forward(decoder: Decoder, turns: list[Turn]) -> tuple[list[StepResult], list[Routing]]:
    texts = [
        TextRows(s.cache, ids, s.request.adapter, len(s.drafted), s.core(decoder))
        for s, ids in turns
    ]
    output = run_rows(decoder, texts)
    chunks = output.hidden_TD.split([len(ids) for _, ids in turns])
    counts = [1 + len(s.drafted) if s.has_read_all else 0 for s, _ in turns]
    wanted = [chunk[len(chunk) - n :] for chunk, n in zip(chunks, counts, strict=True) if n]
    logits_RV = decoder.logits(torch.cat(wanted)) if wanted else output.hidden_TD[:0]
    results = [
        StepResult(sequence, hidden_TD, logits_NV)
        for (sequence, _), hidden_TD, logits_NV in zip(
            turns, chunks, logits_RV.split(counts), strict=True
        )
    ]
    return results, output.routings


def _without_drafts(
    turns: list[Turn], error: Exception
) -> tuple[list[list[Turn]], list[Failure]] | None:
    """Return the same group again without its drafted rows, or None if it had none."""
    if not isinstance(error, ExpertReadError) and not is_out_of_memory(error):
        raise error
    if not any(sequence.drafted for sequence, _ in turns):
        return None
    again = []
    for sequence, ids in turns:
        again.append((sequence, ids[: len(ids) - len(sequence.drafted)]))
        sequence.drop_drafts()
    return [again], []


def _divide(turns: list[Turn], error: Exception) -> tuple[list[list[Turn]], list[Failure]]:
    """Return which sequences to run again, in groups, and which end because of ``error``."""
    if isinstance(error, ExpertReadError):
        reason = _unavailable(str(error))
        ends = list(accumulate(len(ids) for _, ids in turns))
        hit = {bisect_right(ends, row) for row in error.rows}
        assert hit, "a read failed for an expert that no row chose"
        again = [turn for index, turn in enumerate(turns) if index not in hit]
        return [again], [(turns[index][0], reason) for index in sorted(hit)]
    if not is_out_of_memory(error):
        raise error
    if len(turns) == 1:
        return [], [(turns[0][0], _out_of_memory())]
    # It is unknown whose rows exceeded the memory, so each half is tried.
    middle = len(turns) // 2
    return [turns[:middle], turns[middle:]], []


def _unavailable(message: str) -> RequestError:
    return RequestError(message, code="unavailable", status=503, retry_after_s=RETRY_AFTER_S)
