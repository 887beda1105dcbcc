"""What an encoder-decoder generates of semantic ids: sessions of items.

B users, R rows (beams of all users), I items of a session, L codes of an item, N = B * I * L,
D model width, T rows of a session, S rows of all histories, V tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.values.memory import to_device
from ..batch import Batch, batch_of_rows
from ..items.beam import Sessions, search
from ..items.table import ItemTable
from ..routers.routing import Routing
from .documents import batch_of_lengths
from .encoder_decoder import EncoderDecoder
from .target_caches import TargetCaches


def histories(tokens_N: Tensor, lengths: tuple[int, ...]) -> Batch:
    """Return the tokens of histories, one history after another, as sources."""
    return batch_of_lengths(tokens_N, np.array(lengths, dtype=np.int64))


def decoder_inputs(targets_BIL: Tensor, begin: int) -> Tensor:
    """Return what the decoder reads of sessions, ``[B, I * (L + 1) - 1]``.

    Each item is its codes behind the token ``begin``; the last code of all is read by none.
    """
    begins_BI1 = targets_BIL.new_full((*targets_BIL.shape[:2], 1), begin)
    return torch.cat([begins_BI1, targets_BIL], dim=2).flatten(1)[:, :-1]


def predicting_rows(num_items: int, num_levels: int) -> Tensor:
    """Return the rows of a session whose next token is a code, int64 ``[I * L]``."""
    places = torch.arange(num_items * (num_levels + 1))
    return places[places % (num_levels + 1) < num_levels]


class SessionScores(NamedTuple):
    """What a model thinks of sessions."""

    log_probs_B: Tensor
    """Of each session, the sum over its codes, at least in fp32."""
    routings: list[Routing]
    """Of the decoder's layers."""


def session_log_probs(
    model: EncoderDecoder,
    table: ItemTable,
    targets_BIL: Tensor,
    source_hidden_SD: Tensor,
    source_lengths: tuple[int, ...],
) -> SessionScores:
    """Return the log-probability of a session for each history, given by its encoded rows.

    ``targets_BIL`` are the tokens of the sessions. The tokens that begin items have no probability.
    """
    here = source_hidden_SD.device
    inputs_BT = decoder_inputs(targets_BIL, table.begin)
    output = model.decode(batch_of_rows(inputs_BT).to(here), source_hidden_SD, source_lengths)
    rows_C = predicting_rows(*targets_BIL.shape[1:]).to(here)
    hidden_BTD = output.hidden_TD.unflatten(0, inputs_BT.shape)
    logits_NV = model.logits(hidden_BTD[:, rows_C].flatten(0, 1))
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    targets_N1 = to_device(targets_BIL.reshape(-1, 1), here)
    log_probs_N1 = logits_NV.to(wide).log_softmax(dim=1).gather(1, targets_N1)
    return SessionScores(log_probs_N1.reshape(len(targets_BIL), -1).sum(dim=1), output.routings)


def generate_sessions(
    model: EncoderDecoder, table: ItemTable, source: Batch, num_items: int, num_beams: int
) -> Sessions:
    """Return the likeliest sessions after some histories, on the host; see :func:`search`."""
    with torch.no_grad():
        read = model.encode(source)
        room = num_items * (table.num_levels + 1)
        caches = model.new_caches(read.hidden_TD, source.lengths, num_beams, room)
    decoder = _CachedDecoder(model, caches, source.ids_T.device)
    return search(decoder, table, len(source.lengths), num_items, num_beams)


class _CachedDecoder:
    """A decoder of beams with their caches."""

    def __init__(self, model: EncoderDecoder, caches: TargetCaches, device: torch.device) -> None:
        self._model, self._caches, self._device = model, caches, device

    def __call__(self, tokens_RT: Tensor, parents_R: Tensor) -> Tensor:
        """See :class:`.Decode`."""
        num_rows, length = tokens_RT.shape
        self._caches.keep(parents_R.to(self._device))
        batch = Batch(
            ids_T=tokens_RT.flatten().to(self._device),
            positions_T=self._caches.length
            + torch.arange(length, device=self._device).repeat(num_rows),
            lengths=(length,) * num_rows,
        )
        output = self._model.decode(batch, None, (), self._caches)
        last_RD = output.hidden_TD.unflatten(0, (num_rows, length))[:, -1]
        return self._model.logits(last_RD)
