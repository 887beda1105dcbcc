"""How well single units of experts tell features of a text: coverage (Karvonen et al. 2024).

An MoE layer is one wide MLP with E * F units, the values between an expert's products times its
routing weight; units of experts that a token does not visit are 0 (MoE-X, Yang et al. 2025). A
unit tells a feature if the feature is true about where the unit is above some threshold.

N tokens, U = E * F units of a layer, C features, F expert width, D model width, K choices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...kernels.values.activation import gated
from ...moe.batch import batch_of_rows
from ...moe.experts.resident import Experts
from ...moe.models.language_model import LanguageModel

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds, as shares of a unit's largest value."""
FEWEST = 8
"""A feature that is true less often in either half of the text is left out."""


@dataclass(frozen=True, slots=True)
class Units:
    """The values of a layer's units on a text."""

    values_NU: Tensor
    """fp32, times the routing weight; 0 where the token does not visit the expert."""
    num_computed: int
    """How many of them were computed, over all tokens."""

    @property
    def zero_share(self) -> float:
        """The share of computed values that are exactly 0."""
        return 1 - int((self.values_NU != 0).sum()) / max(1, self.num_computed)

    @property
    def effective_units(self) -> float:
        """How many units a token uses: the mean of ``(sum |v|)^2 / sum v^2``.

        That is n if n units have the same size and the others are 0. Tokens without any do not
        count.
        """
        sums_N = self.values_NU.abs().sum(dim=1)
        squares_N = self.values_NU.square().sum(dim=1)
        used = squares_N > 0
        return float((sums_N[used].square() / squares_N[used]).mean())


@torch.no_grad()
def unit_values(model: LanguageModel, ids: Sequence[int], length: int | None = None) -> list[Units]:
    """Return the units of each MoE layer while the model reads ``ids``.

    The model reads windows of ``length`` tokens (None = its longest sequence). Raises
    :class:`ConfigError` if its experts are not in memory as plain weights.
    """
    length = model.config.max_positions if length is None else length
    pieces: list[list[Units]] = []
    handles = []
    for _, layer in model.decoder.moe_layers():
        if not isinstance(layer.experts, Experts):
            raise ConfigError(
                "the experts are quantized or on disk, but units are read from plain ones in "
                "memory; open a folder in fp32 or bf16 without expert-memory."
            )
        seen: list[Units] = []
        pieces.append(seen)

        def hook(
            experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor], seen: list[Units] = seen
        ) -> None:
            assert isinstance(experts, Experts), "it was checked"
            seen.append(_units_of(experts, *arguments[:3]))

        handles.append(layer.experts.register_forward_pre_hook(hook))
    try:
        for start in range(0, len(ids), length):
            model.decoder(batch_of_rows(torch.tensor([ids[start : start + length]])))
    finally:
        for handle in handles:
            handle.remove()
    return [
        Units(torch.cat([s.values_NU for s in seen]), sum(s.num_computed for s in seen))
        for seen in pieces
    ]


def _units_of(experts: Experts, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Units:
    num_experts, _, width = experts.fc2.shape
    values_NEF = torch.zeros(len(x_ND), num_experts, width)
    for expert in range(num_experts):
        rows, choices = (experts_NK == expert).nonzero(as_tuple=True)
        bias_H = None if experts.fc1_bias is None else experts.fc1_bias[expert]
        h_nH = nn.functional.linear(x_ND[rows], experts.fc1[expert], bias_H)
        weight_n1 = weights_NK[rows, choices].float().unsqueeze(1)
        values_NEF[rows, expert] = gated(h_nH, experts.activation).float() * weight_n1
    return Units(values_NEF.flatten(1), int((experts_NK >= 0).sum()) * width)


def coverage(values_NU: Tensor, features: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the F1 with which the best unit tells each feature (bool ``[N]``), by its name.

    The first half of the tokens chooses the unit, its sign and the threshold, and the second half
    scores them: choosing among more units does not by itself give a better score. Units may tell a
    feature by values far above 0 or far below. Features that are true in fewer than ``FEWEST``
    tokens of a half are left out. Raises :class:`DataError` if none is left.
    """
    half = len(values_NU) // 2
    names = [name for name, true_N in features.items() if _is_frequent(true_N, half)]
    if not names:
        raise DataError(
            f"no feature is true in {FEWEST} tokens of each half of the text's {len(values_NU)}; "
            "give a longer text."
        )
    truth_NC = torch.stack([features[name] for name in names], dim=1).float()
    best_C = torch.full((len(names),), -1.0)
    score_C = torch.zeros(len(names))
    for signed_NU in (values_NU, -values_NU):
        largest_U = signed_NU[:half].amax(dim=0).clamp(min=0)
        for share in SHARES:
            is_on_NU = (signed_NU > share * largest_U).float()
            chosen_CU = _f1(is_on_NU[:half], truth_NC[:half])
            scored_CU = _f1(is_on_NU[half:], truth_NC[half:])
            found_C, unit_C = chosen_CU.max(dim=1)
            here_C = scored_CU.gather(1, unit_C.unsqueeze(1)).squeeze(1)
            score_C = torch.where(found_C > best_C, here_C, score_C)
            best_C = torch.maximum(best_C, found_C)
    return dict(zip(names, score_C.tolist(), strict=True))


def _is_frequent(true_N: Tensor, half: int) -> bool:
    return min(int(true_N[:half].sum()), int(true_N[half:].sum())) >= FEWEST


def _f1(is_on_NU: Tensor, truth_NC: Tensor) -> Tensor:
    """Return the F1 of every feature and unit, ``[C, U]``; 0 where a unit is never on."""
    both_CU = truth_NC.T @ is_on_NU
    return 2 * both_CU / (truth_NC.sum(dim=0).unsqueeze(1) + is_on_NU.sum(dim=0)).clamp(min=1)
