"""Direct preference optimisation (DPO, Rafailov et al. 2023): the chosen answer before the other.

The reference is the model that the run starts from (reference.py).

N rows, M rows with a target, S sequences, B pairs, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ...moe.batch import Batch, batch_of_rows
from ...moe.folders.hub import local_folder
from ...moe.models.decoder import Decoder
from ...moe.models.documents import batch_of_lengths
from ...parallel.mesh import Mesh
from ...parallel.watch.pulse import pulse
from ..checkpoints.start_from import weights_identity
from ..config import RunConfig
from ..data.preference import PreferenceData, build_preference_data
from ..data.preference_pairs import PairRows, PreferencePairs
from ..formats.preference import PreferenceConfig
from ..stop import StopRequest
from .dpo import dpo_loss
from .objective import HeldOut, MicroBatchLoss
from .reference import FILE, Reference
from .sized import SizedObjective

MEASURES = ("accuracy", "margin", "chosen_reward", "rejected_reward")
"""Share of pairs with a margin above 0; means of the margin and of both sides' rewards. A reward is
beta times what the model's log-probability gained on the reference's."""


@dataclass(slots=True)
class PreferenceBatch(MicroBatchLoss):
    """The result of one micro-batch, with what the reference is made of."""

    log_probs_B2: Tensor
    """Of the chosen and the rejected answers, summed over their tokens; without gradient."""


class PreferenceLoss(nn.Module):
    """DPO loss of pairs; both sides are sequences of one forward and do not see each other."""

    def __init__(self, decoder: Decoder, beta: float, label_smoothing: float) -> None:
        super().__init__()
        self.decoder = decoder
        self._beta, self._label_smoothing = beta, label_smoothing

    def forward(self, pairs: tuple[PairRows, Tensor]) -> PreferenceBatch:
        """Score pairs, given with fp64 ``[B, 2]``: what the reference gives both answers."""
        rows, reference_B2 = pairs
        here = self.decoder.embed_tokens.weight.device
        output = self.decoder(_batch(rows).to(here))
        log_probs_B2 = self._log_probs(rows, output.hidden_TD)
        reference_B2 = to_device(reference_B2, here).to(log_probs_B2.dtype)
        terms = dpo_loss(
            *(log_probs_B2[:, 0], log_probs_B2[:, 1]),
            *(reference_B2[:, 0], reference_B2[:, 1]),
            beta=self._beta,
            label_smoothing=self._label_smoothing,
        )
        known_B2 = log_probs_B2.detach()
        rewards_2 = self._beta * (known_B2 - reference_B2).sum(dim=0)
        margins_B = terms.margins_B.detach()
        sums = ((margins_B > 0).sum(), margins_B.sum(), *rewards_2)
        return PreferenceBatch(
            *(terms.loss_sum, len(margins_B), output.routings),
            log_probs_B2=known_B2,
            measures=dict(zip(MEASURES, sums, strict=True)),
        )

    def _log_probs(self, rows: PairRows, hidden_TD: Tensor) -> Tensor:
        """Return the log-probability ``[B, 2]`` of each answer: a sum over its tokens, in fp32 or
        wider; the vocabulary's product is computed for the rows with a target alone."""
        here = hidden_TD.device
        places_M = (rows.targets_N >= 0).nonzero().squeeze(1)
        logits_MV = self.decoder.logits(hidden_TD[to_device(places_M, here)])
        wide = torch.promote_types(logits_MV.dtype, torch.float32)
        targets_M = to_device(rows.targets_N[places_M], here)
        each_M = -F.cross_entropy(logits_MV.to(wide), targets_M, reduction="none")
        counts = [int((part >= 0).sum()) for part in rows.targets_N.split(list(rows.lengths))]
        if not counts:
            return each_M.view(0, 2)
        return torch.stack([part.sum() for part in each_M.split(counts)]).view(-1, 2)


class PreferenceObjective(SizedObjective[Decoder]):
    """Each pair says which of two answers is the better one."""

    measures = MEASURES
    data: PreferenceData

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Refuse a run without a reference, and models that a reference does not fit."""
        super().check(config)
        if config.start_from is None and not (Path(config.run_dir) / "data" / FILE).is_file():
            raise ConfigError(
                "data.format is preference, but start_from is not given; give the folder of the "
                "model to tune, which is the reference, too."
            )
        moe = config.model.moe
        if moe is None:
            return
        if moe.router.most_rows(config.train.sequence_length, moe.num_experts) is not None:
            raise ConfigError(
                f"data.format is preference, but the {moe.router.kind} router limits the rows of "
                "an expert in training, so that the model would not be its own reference; set "
                "model.moe.router.capacity to null, or use another router."
            )

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> PreferenceData:
        """Tokenize the pairs and hold a part out."""
        return build_preference_data(config, folder, mesh, stop)

    def module(self, decoder: Decoder) -> nn.Module:
        """Return :class:`PreferenceLoss`."""
        options = self.config.data
        assert isinstance(options, PreferenceConfig), "the table of objectives says so"
        return PreferenceLoss(decoder, options.beta, options.label_smoothing)

    def before_training(self, module: nn.Module, mesh: Mesh, stop: StopRequest) -> None:
        """Score the pairs that the run will see, unless an earlier start has."""
        pulse.begin("computing the reference")
        data, train, start = self.data, self.config.train, self.config.start_from
        made_from = {
            "data": data.identity,
            "held-out data": data.held_out_identity,
            "train.sequence_length": train.sequence_length,
            "train.precision": train.precision,
            "model": json.loads(json.dumps(self.config.model.architecture())),
            "start_from": None if start is None else weights_identity(local_folder(start)),
        }
        sides = {"train": data.train, "held_out": data.held_out}
        sizes = {name: len(pairs) for name, pairs in sides.items()}
        self._reference = Reference(data.folder / FILE, made_from, sizes)
        needed = {
            "train": data.train.until(train.steps),
            "held_out": self.held_out_windows(len(data.held_out)),
        }
        if start is None and any(self._reference.missing(*some) for some in needed.items()):
            raise ConfigError(
                "start_from is not given, but train.steps or train.eval_sequences asks for pairs "
                f"that {data.folder / FILE} does not have; give start_from, or put them back."
            )
        module.eval()
        for name, pairs in needed.items():
            # With the kernels and the batches of what it is compared with, so margins begin at 0.
            with torch.set_grad_enabled(name == "train"):
                score = partial(_score, module, sides[name])
                self._reference.compute(name, pairs, score, self.per_rank(mesh), mesh, stop)
        module.train()

    def batch(self, step: int, rows: range, device: torch.device) -> tuple[PairRows, Tensor]:
        """Return some pairs of the global batch with their reference, on the host: the module
        counts and moves them."""
        return self._with_reference("train", self.data.train, self.data.train.at(step, rows))

    @property
    def window_length(self) -> int:
        """The most rows of a pair."""
        return 2 * self.config.train.sequence_length

    def divisor(self, step: int) -> int:
        """Return the pairs of the global batch."""
        return self.config.train.batch_sequences

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out pairs, split over the ranks."""
        held_out = self.data.held_out
        sums = torch.zeros(len(MEASURES), dtype=torch.float64)

        def part_of(pairs: Sequence[int]) -> MicroBatchLoss:
            part: PreferenceBatch = module(self._with_reference("held_out", held_out, list(pairs)))
            sums.add_(torch.stack([part.measures[name].double().cpu() for name in MEASURES]))
            return part

        loss, num_pairs = self.score(part_of, module, len(held_out), mesh)
        means = (mesh.sum(sums) / num_pairs).tolist()
        found = {f"eval_{name}": mean for name, mean in zip(MEASURES, means, strict=True)}
        return HeldOut({"eval_loss": loss} | found, num_pairs)

    def _with_reference(
        self, name: str, own: PreferencePairs, pairs: list[int]
    ) -> tuple[PairRows, Tensor]:
        return own.rows(pairs), self._reference.log_probs[name][pairs]


def _score(module: nn.Module, own: PreferencePairs, pairs: list[int]) -> Tensor:
    """Return the log-probabilities fp64 ``[B, 2]`` of some pairs."""
    unknown_B2 = torch.zeros(len(pairs), 2, dtype=torch.float64)
    part: PreferenceBatch = module((own.rows(pairs), unknown_B2))
    return part.log_probs_B2.double().cpu()


def _batch(rows: PairRows) -> Batch:
    """Return the conversations as sequences that begin at position 0."""
    if not rows.lengths:
        return batch_of_rows(rows.ids_N.new_empty(0, 1))  # this rank helps others' experts
    return batch_of_lengths(rows.ids_N, np.array(rows.lengths, dtype=np.int64))
