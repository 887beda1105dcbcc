"""Cross-entropy of sessions' semantic ids, and preferences between generated sessions (OneRec).

B rows, I items of a session, L codes of an item, N tokens of histories, P pairs, V tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ...moe.config.model import LayersConfig
from ...moe.items.beam import Sessions
from ...moe.items.table import ItemTable
from ...moe.models.encoder_decoder import EncoderDecoder
from ...moe.models.sessions import (
    generate_sessions,
    histories,
    session_log_probs,
)
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.session_order import SessionRows
from ..data.sessions import SessionsData, build_sessions_data
from ..formats.sessions import AlignmentConfig, SessionsConfig
from ..stop import StopRequest
from .dpo import dpo_loss
from .objective import HeldOut, MicroBatchLoss
from .sized import SizedObjective


class PairRows(NamedTuple):
    """The pairs of some rows of a batch."""

    rows_P: Tensor
    """int64: the row of each pair."""
    targets_2PIL: Tensor
    """int64: the tokens of all better sessions, then of the worse ones."""
    reference_2P: Tensor
    """fp64: their log-probabilities under the model that generated them."""


class RankRows(NamedTuple):
    """A batch, on the host: the module counts and moves it."""

    sessions: SessionRows
    pairs: PairRows | None


@dataclass(slots=True)
class RankedBatch(MicroBatchLoss):
    """The result of one micro-batch."""

    log_probs_B: Tensor
    """Of the rows' sessions, then of the better ones of pairs, then of the worse ones."""
    generated: Sessions | None
    """What the model recommends for the histories; in evaluations only."""


class RankLoss(nn.Module):
    """Scores sessions, and generates some in evaluations, in one forward (FSDP)."""

    def __init__(self, model: EncoderDecoder, table: ItemTable, data: SessionsConfig) -> None:
        super().__init__()
        self.model = model
        self.table = table
        self._sizes = (data.session_items, data.beams)
        self._alignment = data.alignment

    def forward(self, batch: RankRows) -> RankedBatch:
        """Return the negative log-likelihood of the sessions, and what pairs add to it."""
        own, pairs = batch
        here = self.model.device
        source = histories(own.source_N, own.lengths).to(here)
        read = self.model.encode(source)
        hidden_SD, lengths, targets = read.hidden_TD, own.lengths, own.targets_BIL
        if pairs is not None:
            # Both sessions of a pair follow the history of its row, which is encoded once.
            parts = hidden_SD.split(lengths)
            rows = pairs.rows_P.tolist() * 2
            hidden_SD = torch.cat([hidden_SD, *(parts[row] for row in rows)])
            lengths = (*lengths, *(lengths[row] for row in rows))
            targets = torch.cat([targets, pairs.targets_2PIL])
        scores = session_log_probs(self.model, self.table, targets, hidden_SD, lengths)
        log_probs_B, routings = scores
        num_rows = len(own.lengths)
        loss = -log_probs_B[:num_rows].sum()
        if pairs is not None and self._alignment is not None:
            loss = loss + self._alignment.weight * preference_loss(
                log_probs_B[num_rows:], pairs, self._alignment
            )
        generated = None
        if not self.training:
            generated = generate_sessions(self.model, self.table, source, *self._sizes)
        num_targets = own.targets_BIL.numel()
        return RankedBatch(loss, num_targets, read.routings + routings, log_probs_B, generated)


def preference_loss(log_probs_2P: Tensor, pairs: PairRows, config: AlignmentConfig) -> Tensor:
    """Return DPO's loss, summed over the pairs."""
    better_P, worse_P = log_probs_2P.chunk(2)
    reference_2P = to_device(pairs.reference_2P, log_probs_2P.device).to(log_probs_2P.dtype)
    reference_better_P, reference_worse_P = reference_2P.chunk(2)
    terms = dpo_loss(better_P, worse_P, reference_better_P, reference_worse_P, config.beta)
    return terms.loss_sum


class RankObjective(SizedObjective[EncoderDecoder]):
    """Each row is a user's history and the session that followed.

    Its tokens are those of both; pairs that it is compared with do not count.
    """

    model_kinds = ("encoder_decoder",)
    data: SessionsData

    def __init__(self, config: RunConfig, data: SessionsData) -> None:
        super().__init__(config, data)
        assert isinstance(config.data, SessionsConfig), "who chose this objective?"
        self._section = config.data
        pairs = data.pairs
        places = [] if pairs is None else pairs.sessions_P.tolist()
        self._pair_of = {session: pair for pair, session in enumerate(places)}

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> SessionsData:
        """Read the log and hold the last session of each user out."""
        return build_sessions_data(config, folder, mesh, stop)

    def complete_model(self, model: LayersConfig) -> LayersConfig:
        """Give the model a token for each code, and one that begins an item.

        Raises :class:`ConfigError` where ``model.vocab_size`` is another number, and for sessions
        that are longer than the model's targets.
        """
        table = self.data.table
        if model.vocab_size not in (None, table.vocabulary):
            raise ConfigError(
                f"model.vocab_size is {model.vocab_size}, but {self._section.items} has "
                f"{table.num_levels} levels of {table.num_codes} codes, which are "
                f"{table.vocabulary} tokens with the one that begins an item; leave it out."
            )
        longest = self._section.session_items * (table.num_levels + 1)
        if longest > model.max_positions:
            raise ConfigError(
                f"data.session_items is {self._section.session_items}, which are {longest} tokens, "
                f"but model.max_positions is {model.max_positions}; lower the one or raise the "
                "other."
            )
        return model.model_copy(update={"vocab_size": table.vocabulary, "start_id": table.begin})

    def module(self, decoder: EncoderDecoder) -> nn.Module:
        """Return :class:`RankLoss`."""
        return RankLoss(decoder, self.data.table, self._section)

    def batch(self, step: int, rows: range, device: torch.device) -> RankRows:
        """Return some sessions of the global batch, and their pairs."""
        chosen = self.data.train.at(step, rows)
        found = [
            (row, self._pair_of[one]) for row, one in enumerate(chosen) if one in self._pair_of
        ]
        return RankRows(self.data.train.rows(chosen), self._pairs(found))

    def _pairs(self, found: list[tuple[int, int]]) -> PairRows | None:
        """Return (row, pair)s as tokens."""
        pairs = self.data.pairs
        if pairs is None or not found:
            return None
        chosen_P = [pair for _, pair in found]
        items_2PI = pairs.items_P2I[chosen_P].transpose(0, 1).flatten(0, 1)
        return PairRows(
            torch.tensor([row for row, _ in found]),
            self.data.table.tokens(items_2PI),
            pairs.reference_P2[chosen_P].T.flatten(),
        )

    def divisor(self, step: int) -> int:
        """Return the codes of the sessions of the global batch."""
        codes = self._section.session_items * self.data.table.num_levels
        return self.config.train.batch_sequences * codes

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out sessions, and the items recommended instead."""
        held_out = self.data.held_out
        hits = torch.zeros(1, dtype=torch.float64)

        def part_of(chosen: Sequence[int]) -> MicroBatchLoss:
            # A rank without a session computes one for the experts it holds, and leaves it out.
            part: RankedBatch = module(RankRows(held_out.rows(list(chosen) or [0]), None))
            assert part.generated is not None, "the module is in evaluation"
            if not chosen:
                return MicroBatchLoss(part.loss_sum * 0, 0, [])
            wanted = held_out.sessions.items_CI[list(chosen)].tolist()
            for user, items in enumerate(wanted):
                hits.add_(recall(part.generated, user, items, self._section.recall_at))
            return part

        loss, num_targets = self.score(part_of, module, len(held_out), mesh)
        codes = self._section.session_items * self.data.table.num_levels
        mean = float(mesh.sum(hits)) / (num_targets / codes)
        return HeldOut({"eval_loss": loss, "eval_recall": mean}, num_targets)


def recall(generated: Sessions, user: int, wanted: Sequence[int], count: int) -> float:
    """Return the share of a session's items that are among ``count`` recommended ones."""
    found = set(generated.best_items(user, count))
    return len(found & set(wanted)) / len(set(wanted))
