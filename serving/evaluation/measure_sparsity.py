"""Measure on a text which values of experts are small: thresholds for expert-sparsity.

n rows of one expert, E experts, D model width, F expert width, H = 2F, C channels: D or F.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...kernels.values.channel_weights import ChannelLimits
from ...moe.experts.resident import Experts
from ...moe.models.language_model import LanguageModel
from ..experts.sparsity import KINDS, Key, Score, Sparsity, owner_of
from .allocate_sparsity import MOST, Levels, greedy_levels, last_rows
from .held_out_text import score_text
from .score_histograms import Histograms

Allocation = Literal["uniform", "greedy"]
FEWEST_TOKENS = 2000
MEAN_ROWS = 32
"""An expert with fewer rows has no mean of up: the norm of its rows of up stands in."""


class Observer(Protocol):
    """Sees the rows of each expert."""

    def see(self, layer: int, expert: int, experts: Experts, x_nD: Tensor, h_nH: Tensor) -> None:
        """``x`` went into ``expert``, whose first product is ``h``."""
        ...


@contextmanager
def observing(model: LanguageModel, observer: Observer) -> Iterator[None]:
    """Show the rows of all experts, which must be in memory as parameters."""
    handles = []
    for layer, module in model.decoder.moe_layers():
        if not isinstance(module.experts, Experts):
            raise ConfigError(
                "the experts are quantized or on disk, but thresholds are measured on plain ones "
                "in memory; open a folder in fp32 or bf16 without expert-memory."
            )

        def hook(
            experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor], layer: int = layer
        ) -> None:
            assert isinstance(experts, Experts), "it was checked"
            x_ND, experts_NK = arguments[:2]
            for expert in experts_NK.unique().tolist():
                if expert >= 0:
                    x_nD = x_ND[(experts_NK == expert).any(dim=1)]
                    bias_H = None if experts.fc1_bias is None else experts.fc1_bias[expert]
                    h_nH = nn.functional.linear(x_nD, experts.fc1[expert], bias_H)
                    observer.see(layer, expert, experts, x_nD, h_nH)

        handles.append(module.experts.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ScoreSizes:
    """How large a score is on a text: thresholds for any target."""

    def __init__(self, model: LanguageModel, text: str, score: Score, length: int | None) -> None:
        self._model, self._score, self._of_text = model, score, (text, length)
        self._norms = _norms_of_weights(model) if score == "wina" else {}
        if score == "chess":
            means = _Means(model)
            with observing(model, means):
                score_text(model, text, length)
            self._norms = {key: means.norm(key[0]) for key in means.sums}
        self._histograms = Histograms(score, self._norms)
        with observing(model, self._histograms):
            score_text(model, text, length)

    def at(self, target: float, allocation: Allocation = "uniform") -> Sparsity:
        """Return the thresholds that make ``target`` of the channels count as 0.

        ``greedy`` shares it between a layer's products (allocate_sparsity.py).
        """
        kinds, layers = KINDS[self._score], self._model.decoder.moe_layers()
        levels = {layer: dict.fromkeys(kinds, target) for layer, _ in layers}
        if allocation == "greedy":
            rows = last_rows(self._model, *self._of_text)
            for layer, module in layers:
                shape = (layer, module.num_experts, module.d_model, module.d_expert)
                levels[layer] = greedy_levels(rows[layer], target, partial(self._limits, *shape))
        thresholds = {
            key: threshold_E
            for layer, module in layers
            for key, threshold_E in self._at(layer, module.num_experts, levels[layer]).items()
        }
        owner = owner_of(self._model.decoder)
        return Sparsity(self._score, target, owner, thresholds, self._norms)

    def _at(self, layer: int, num_experts: int, levels: Levels) -> dict[Key, Tensor]:
        return {
            (layer, kind): self._histograms.thresholds((layer, kind), level, num_experts)
            for kind, level in levels.items()
        }

    def _limits(
        self, layer: int, num_experts: int, d_model: int, d_expert: int, levels: Levels
    ) -> ChannelLimits:
        thresholds = self._at(layer, num_experts, levels)
        found = Sparsity(self._score, 0.0, None, thresholds, self._norms)
        limits = found.limits(layer, d_model, d_expert)
        assert limits is not None, "there is a score"
        return limits


def measure_sparsity(
    model: LanguageModel,
    text: str,
    score: Score,
    target: float,
    length: int | None = None,
    allocation: Allocation = "uniform",
) -> Sparsity:
    """Return thresholds that make ``target`` of the channels count as 0 on ``text``.

    ``allocation`` says whether all products of a layer have that share, or what TEAL's greedy
    search gives them. An expert with few rows takes the threshold of its layer's rows. Raises
    :class:`ConfigError` for a target that is no share, for a score of gates where there are none
    and for one with ``greedy``, and :class:`DataError` for a text of fewer than
    :data:`FEWEST_TOKENS` tokens.
    """
    moe = model.config.moe
    if moe is not None and "gate" in KINDS[score] and "gate" not in moe.fc1_parts:
        raise ConfigError(
            f"score is {score}, which compares gates, but {moe.activation} experts have none; use "
            "teal or wina."
        )
    if allocation == "greedy" and "gate" in KINDS[score]:
        raise ConfigError(
            f"allocation is greedy, but score is {score}, which leaves out the same channels of up "
            "and down; use teal or wina."
        )
    if allocation == "greedy" and target > MOST:
        raise ConfigError(f"target is {target:g}; greedy allocation takes at most {MOST:g}.")
    if not 0 < target < 1:
        raise ConfigError(f"target is {target:g}; give a share above 0 and below 1, such as 0.4.")
    tokens = len(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if tokens < FEWEST_TOKENS:
        raise DataError(
            f"the text has {tokens} tokens, which say too little of rare experts; give one of "
            f"{FEWEST_TOKENS} or more."
        )
    return ScoreSizes(model, text, score, length).at(target, allocation)


class _Means:
    """Sums of |up| of each expert's channels."""

    def __init__(self, model: LanguageModel) -> None:
        self.sums: dict[Key, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        for layer, module in model.decoder.moe_layers():
            if not isinstance(module.experts, Experts):
                continue  # observing() refuses them
            fc1_EHD = module.experts.fc1
            num_experts, height = fc1_EHD.shape[:2]
            self.sums[layer, "gate"] = torch.zeros(num_experts, height // 2)
            self._rows[layer] = torch.zeros(num_experts, 1)
            self._weights[layer] = fc1_EHD[:, height // 2 :].float().norm(dim=2)

    def see(self, layer: int, expert: int, experts: Experts, x_nD: Tensor, h_nH: Tensor) -> None:
        """Add the rows of an expert."""
        up_nF = h_nH.chunk(2, dim=-1)[1].float()
        if experts.activation == "clamped_swiglu":
            up_nF = up_nF + 1
        self.sums[layer, "gate"][expert] += up_nF.abs().sum(dim=0)
        self._rows[layer][expert] += len(x_nD)

    def norm(self, layer: int) -> Tensor:
        """Return the mean |up|, ``[E, F]``."""
        sums_EF, rows_E1 = self.sums[layer, "gate"], self._rows[layer]
        mean_EF, weights_EF = sums_EF / rows_E1.clamp(min=1), self._weights[layer]
        seen_E = (rows_E1 >= MEAN_ROWS).squeeze(1)
        if not seen_E.any():
            return weights_EF
        scale = mean_EF[seen_E].mean() / weights_EF[seen_E].mean()
        return torch.where(seen_E.unsqueeze(1), mean_EF, weights_EF * scale)


def _norms_of_weights(model: LanguageModel) -> dict[Key, Tensor]:
    """Return the norms of the columns of gate and up together, and of down."""
    norms = {}
    for layer, module in model.decoder.moe_layers():
        if not isinstance(module.experts, Experts):
            continue  # observing() refuses them
        norms[layer, "x"] = torch.stack([w.float().norm(dim=0) for w in module.experts.fc1])
        norms[layer, "act"] = torch.stack([w.float().norm(dim=0) for w in module.experts.fc2])
    return {key: norm.detach() for key, norm in norms.items()}
