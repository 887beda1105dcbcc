"""Targets for sources, written token by token: the likeliest token, or a beam search.

C sources, K beams of a source, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ..batch import Batch, batch_of
from ..routers.causal import check_causal
from .encoder_decoder import EncoderDecoder

MaskTokens = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""Takes log-probabilities of the next tokens, fp32 ``[C*K, V]``, and the ids that each of these
targets has so far; returns them with ``-inf`` at tokens that must not come. The probabilities of
the others stay as they are."""


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """How targets are searched, and what ends them."""

    max_new_tokens: int
    beams: int = 1
    """Beginnings of a target that are followed together; 1 = always the likeliest token."""
    length_penalty: float = 1.0
    """Finished targets compete by their log-probability over ``length ** length_penalty``."""
    eos_ids: Collection[int] = frozenset()

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("beams", self.beams)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}; use a whole number from 1 upwards.")


class Written(NamedTuple):
    """A target that a model wrote."""

    ids: list[int]
    """Without the token before it, and without the one that ended it."""
    score: float
    """Its log-probability in nats, over ``length ** length_penalty``."""
    is_ended: bool
    """False if it has ``max_new_tokens``, and the model would have gone on."""


@dataclass(slots=True)
class _Search:
    """The targets of one source."""

    running: list[list[int]]
    """The ids of each beam."""
    finished: list[Written] = field(default_factory=list)
    """Best first, at most one for each beam."""
    is_done: bool = False


@torch.inference_mode()
def write_targets(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    limits: TargetLimits,
    mask: MaskTokens | None = None,
) -> list[list[Written]]:
    """Return the targets of each source, best first: as many as there are beams, or fewer.

    ``sources`` are ids as in training, with the end of each text. ``model`` is in evaluation mode.
    The search is that of transformers' ``generate`` with ``num_beams`` and without early stopping.
    ``mask`` leaves tokens out; where it leaves none, a beam ends without a target.

    Raises :class:`ConfigError` for sources without ids or too long, and for routers whose choices
    need later tokens.
    """
    _check(model, sources, limits)
    if not sources:
        return []
    device, beams = model.device, limits.beams
    lengths = tuple(len(ids) for ids in sources)
    batch = batch_of([torch.tensor(ids, dtype=torch.int64) for ids in sources]).to(device)
    hidden_SD = model.encode(batch).hidden_TD
    caches = model.new_caches(hidden_SD, lengths, beams, limits.max_new_tokens)
    start_id = model.config.start_id
    assert start_id is not None, "_check asks for it"
    last_B = torch.full((len(sources) * beams,), start_id, dtype=torch.int64)
    scores_CK = torch.full((len(sources), beams), -torch.inf)
    scores_CK[:, 0] = 0.0  # all beams begin alike, and one of them is enough
    searches = [_Search([[] for _ in range(beams)]) for _ in sources]
    for step in range(limits.max_new_tokens):
        hidden_BD = model.decode(_next_rows(last_B, step, device), None, (), caches).hidden_TD
        logits_BV = model.logits(hidden_BD).float().cpu()
        nats_BV = logits_BV.log_softmax(dim=-1)
        if mask is not None:
            nats_BV = mask(nats_BV, [ids for search in searches for ids in search.running])
        totals_CN = (nats_BV.view(len(sources), beams, -1) + scores_CK[:, :, None]).flatten(1)
        best = totals_CN.topk(min(2 * beams, totals_CN.shape[1]), dim=1)
        num_ids = nats_BV.shape[1]
        kept_B: list[int] = []
        for number, search in enumerate(searches):
            places = best.indices[number].tolist()
            chosen = _advance(
                search, best.values[number].tolist(), places, num_ids, limits, step + 1
            )
            kept_B += [number * beams + place // num_ids for place, _ in chosen]
            last_B[number * beams : (number + 1) * beams] = torch.tensor(
                [place % num_ids for place, _ in chosen]
            )
            scores_CK[number] = torch.tensor([score for _, score in chosen])
        if all(search.is_done for search in searches):
            break
        if beams > 1:
            caches.keep(to_device(torch.tensor(kept_B), device))
    return [search.finished for search in searches]


def _advance(
    search: _Search,
    totals: Sequence[float],
    places: Sequence[int],
    num_ids: int,
    limits: TargetLimits,
    length: int,
) -> list[tuple[int, float]]:
    """Give a search its next tokens, and return the place and the score of each beam's.

    ``totals`` are the log-probabilities of the best continuations, and ``places`` say which beam
    and which token they are. ``length`` is that of the continued targets.
    """
    beams, over = limits.beams, float(length) ** limits.length_penalty
    is_last = length == limits.max_new_tokens
    chosen: list[tuple[int, float]] = []
    for rank, (total, place) in enumerate(zip(totals, places, strict=True)):
        if total == -float("inf"):
            continue
        beam, token = divmod(place, num_ids)
        ids, ends = search.running[beam], token in limits.eos_ids
        if (ends or is_last) and rank < beams and not search.is_done:
            whole = ids if ends else [*ids, token]
            search.finished.append(Written(whole, total / over, ends))
        if not ends and len(chosen) < beams:
            chosen.append((place, total))
    search.finished.sort(key=lambda written: -written.score)
    del search.finished[beams:]
    is_full = len(search.finished) == beams
    best = chosen[0][1] / over if chosen else -float("inf")
    search.is_done |= not chosen or (is_full and best <= search.finished[-1].score)
    chosen += [(0, -float("inf"))] * (beams - len(chosen))  # beams without a continuation
    search.running = [[*search.running[p // num_ids], p % num_ids] for p, _ in chosen]
    return chosen


def _next_rows(ids_B: Tensor, position: int, device: torch.device) -> Batch:
    """Return one row for each target."""
    positions_B = torch.full_like(ids_B, position)
    return Batch(ids_B.clone(), positions_B, (1,) * len(ids_B)).to(device)


def _check(model: EncoderDecoder, sources: Sequence[Sequence[int]], limits: TargetLimits) -> None:
    config = model.config
    if config.start_id is None:
        raise ConfigError("model.start_id is missing, so no target can begin; give it an id.")
    for index, router in model.routed_layers():
        if index >= config.num_source_layers:
            check_causal(router.config)
    for number, ids in enumerate(sources):
        if not 1 <= len(ids) <= config.max_positions:
            raise ConfigError(
                f"source {number} has {len(ids)} tokens; give 1 to {config.max_positions}, which "
                "is model.max_positions."
            )
        outside = [one for one in ids if not 0 <= one < config.vocabulary]
        if outside:
            raise ConfigError(
                f"source {number} has the id {outside[0]}; use ids from 0 to "
                f"{config.vocabulary - 1}."
            )
    if limits.max_new_tokens > config.max_positions:
        raise ConfigError(
            f"max_new_tokens is {limits.max_new_tokens}, but the model has positions for "
            f"{config.max_positions}; lower it."
        )
