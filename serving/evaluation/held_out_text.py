"""The loss of a model on a text.

B windows, L tokens each, N = B*L rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...errors import ConfigError, DataError
from ...moe.batch import batch_of
from ...moe.models.language_model import LanguageModel
from ...progress import Progress

ROWS = 2048
"""Tokens of a forward pass, unless one window is longer."""


@dataclass(frozen=True, slots=True)
class TextScore:
    """What a model makes of a text."""

    loss: float
    """Mean cross-entropy in nats per token."""
    length: int
    """Tokens of a window; short ones give a model less to go by."""
    tokens: int
    """Tokens that were predicted."""
    bytes: int
    """Length of the whole text."""
    loss_per_byte: float
    """Nats per byte, which models with different tokenizers can be compared by."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)`` per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """``loss_per_byte`` in bits."""
        return self.loss_per_byte / math.log(2)


def score_text(
    model: LanguageModel,
    text: str,
    length: int | None = None,
    limit: int | None = None,
    by_steps: bool = False,
    second_halves: bool = False,
) -> TextScore:
    """Predict every token of ``text`` but the first, in windows of ``length`` tokens.

    Window n reads tokens ``n*L`` to ``(n+1)*L - 1`` and predicts each one's successor, as the
    held-out evaluation of training does. ``length`` defaults to the model's longest sequence, at
    most 2048. ``limit`` is the most tokens that are predicted. ``by_steps`` gives the model one
    token after the other, as an answer does. With ``second_halves`` a window's first half is read
    as a prompt and only the tokens after it count, which follow in one piece; models whose answers
    use core channels of experts are always scored so. Raises :class:`DataError` for a text without
    a token to predict.
    """
    second_halves = second_halves or model.decoder.core is not None
    longest = model.config.max_positions
    length = min(longest, ROWS) if length is None else length
    if not 1 <= length <= longest:
        raise ConfigError(f"length is {length}, but the model takes 1 to {longest} tokens.")
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if limit is not None and len(ids) > limit + 1:
        ids = ids[: limit + 1]
        text = model.tokenizer.decode(ids)
    num_targets = len(ids) - 1
    if num_targets < 1:
        raise DataError(f"the text has {len(ids)} tokens; give one of two tokens or more.")
    device = model.decoder.embed_tokens.weight.device
    ids_T = torch.tensor(ids, dtype=torch.int64, device=device)
    loss_sum, num_scored = 0.0, 0
    starts = range(0, num_targets, length)
    per_pass = max(1, ROWS // length)
    with Progress("evaluating", num_targets) as progress:
        whole = [start for start in starts if start + length <= num_targets]
        passes = [whole[first : first + per_pass] for first in range(0, len(whole), per_pass)]
        passes += [[start] for start in starts[len(whole) :]]  # the rest of the text
        for windows in passes:
            reach = min(length, num_targets - windows[0])
            inputs_BL = torch.stack([ids_T[start : start + reach] for start in windows])
            targets_BL = torch.stack([ids_T[start + 1 : start + 1 + reach] for start in windows])
            progress.advance(targets_BL.numel())
            if second_halves:
                targets_BL = targets_BL[:, reach // 2 :]
                if reach < 2:
                    continue
                scored = _after_halves(model, inputs_BL)
            else:
                scored = _by_steps(model, inputs_BL) if by_steps else model(inputs_BL).flatten(0, 1)
            logits_NV = scored.float()
            part = F.cross_entropy(logits_NV, targets_BL.flatten(), reduction="sum")
            loss_sum += float(part)
            num_scored += targets_BL.numel()
    if num_scored == 0:
        raise DataError(f"windows of {length} tokens have no halves; use a length of 2 or more.")
    num_bytes = len(text.encode())
    loss = loss_sum / num_scored
    return TextScore(loss, length, num_scored, num_bytes, loss * len(ids) / num_bytes)


@torch.inference_mode()
def _after_halves(model: LanguageModel, inputs_BL: torch.Tensor) -> torch.Tensor:
    """Return the scores of the tokens of second halves, ``[N, V]``, as those of answers."""
    decoder, length = model.decoder, inputs_BL.shape[1]
    prompts, answers = (list(half) for half in inputs_BL.split([length // 2, -(-length // 2)], 1))
    caches = [decoder.new_cache(length) for _ in prompts]
    cores = [decoder.new_core(length // 2) for _ in prompts]
    decoder(batch_of(prompts, caches, cores=cores))
    return decoder.logits(decoder(batch_of(answers, caches, cores=cores)).hidden_TD)


@torch.inference_mode()
def _by_steps(model: LanguageModel, inputs_BL: torch.Tensor) -> torch.Tensor:
    """Return the scores of each window's tokens, ``[N, V]``, of forwards over one row each."""
    scores = []
    for ids_L in inputs_BL:
        cache = model.decoder.new_cache(len(ids_L))
        for ids_1 in ids_L.split(1):
            hidden_1D = model.decoder(batch_of([ids_1], [cache])).hidden_TD
            scores.append(model.decoder.logits(hidden_1D))
    return torch.cat(scores)
