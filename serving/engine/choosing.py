"""From a forward's rows to tokens of one request, and scores of its prompt.

T rows that a request has just read, N rows that a token follows, D model width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import RequestError
from ...moe.models.decoder import Decoder
from ...moe.models.sampling import sample
from .logprobs import TokenLogprob, score_tokens
from .sequence import GenerationEvent, Sequence


def choose_tokens(sequence: Sequence, logits_NV: Tensor) -> Iterator[GenerationEvent]:
    """Choose a token from each row as if it were alone, up to the first that was not drafted.

    Raises :class:`RequestError` at scores that are not finite.
    """
    for row, logits_V in enumerate(logits_NV):
        if not logits_V.isfinite().all():
            raise RequestError(
                "the model gave scores that are not finite; check its weights.",
                code="unavailable",
                status=503,
            )
        event = _choose(sequence, logits_V)
        yield event
        is_last = event.finish_reason is not None
        if is_last or sequence.drafted[row : row + 1] != (sequence.last_id,):
            return


def score_prompt(decoder: Decoder, sequence: Sequence, hidden_TD: Tensor) -> None:
    """Add the log-probabilities of the prompt tokens just read, if asked for."""
    request = sequence.request
    if not request.scores_prompt or request.num_logprobs is None or sequence.job.has_begun:
        return
    end = sequence.cache.length
    start = end - len(hidden_TD)
    if start == 0:
        sequence.prompt_logprobs.append(TokenLogprob(request.prompt_ids[0], None))
    targets = list(request.prompt_ids[start + 1 : end + 1])
    if targets:
        logits_NV = decoder.logits(hidden_TD[: len(targets)])
        sequence.prompt_logprobs += score_tokens(logits_NV, targets, request.num_logprobs)


def _choose(sequence: Sequence, logits_V: Tensor) -> GenerationEvent:
    request = sequence.request
    allowed_V = logits_V
    if forbidden := sequence.forbidden_ids:
        allowed_V = logits_V.index_fill(0, torch.tensor(forbidden), -torch.inf)
    token = sample(allowed_V, request.sampling, sequence.generator)
    scores: list[TokenLogprob] = []
    if request.num_logprobs is not None:
        scores = score_tokens(logits_V.unsqueeze(0), [token], request.num_logprobs)
    return sequence.accept(token, scores)
