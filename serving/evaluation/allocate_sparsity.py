"""Share a target of sparsity between the inputs of a layer's products: TEAL's greedy search.

The first product of experts and the second one bear sparsity differently. Both begin with none.
Each step gives one of them more, the one that changes the layer's output less, until the share of
weights that are left out reaches the target (arXiv 2408.14690, algorithm 1).

N rows, K choices, E experts, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.values.channel_weights import ChannelExpertWeights, ChannelLimits
from ...moe.experts.resident import Experts
from ...moe.models.language_model import LanguageModel
from .held_out_text import score_text

STEP = 0.025
"""Share of a layer's weights that a step leaves out."""
MOST = 0.95
"""Highest share of channels that count as 0."""
MOST_ROWS = 1024
"""Rows of a layer that the search looks at: the last ones of the text."""

Levels = dict[str, float]
"""By kind of values: the share of channels that counts as 0."""


@dataclass(slots=True)
class LayerRows:
    """What went into the experts of a layer."""

    experts: Experts
    x_ND: Tensor
    experts_NK: Tensor
    weights_NK: Tensor

    def output(self, limits: ChannelLimits | None) -> Tensor:
        """Return what the layer gives with these limits, fp32 ``[N, D]``."""
        own = self.experts
        fc1, fc2_SFD = own.fc1.detach().float(), own.fc2.detach().float().mT.contiguous()
        weights = ChannelExpertWeights(fc1, fc2_SFD, activation=own.activation, limits=limits)
        x_ND, out_ND = self.x_ND.float(), torch.zeros_like(self.x_ND, dtype=torch.float32)
        for expert in self.experts_NK.unique().tolist():
            if expert < 0:
                continue
            rows, choice = (self.experts_NK == expert).nonzero(as_tuple=True)
            kept_nD = weights.keep_x(x_ND[rows], expert)
            bias_H = None if own.fc1_bias is None else own.fc1_bias[expert].float()
            act_nF = weights.activate(F.linear(kept_nD, fc1[expert], bias_H), expert)
            bias_D = None if own.fc2_bias is None else own.fc2_bias[expert].float()
            y_nD = F.linear(act_nF, fc2_SFD[expert].mT, bias_D)
            out_ND.index_add_(0, rows, y_nD * self.weights_NK[rows, choice].float().unsqueeze(1))
        return out_ND


def last_rows(model: LanguageModel, text: str, length: int | None) -> dict[int, LayerRows]:
    """Return the last rows of ``text`` in each MoE layer."""
    found: dict[int, LayerRows] = {}
    with _keeping(model, found):
        score_text(model, text, length)
    return found


@contextmanager
def _keeping(model: LanguageModel, found: dict[int, LayerRows]) -> Iterator[None]:
    handles = []
    for layer, module in model.decoder.moe_layers():

        def hook(
            experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor], layer: int = layer
        ) -> None:
            assert isinstance(experts, Experts), "thresholds are measured on plain ones"
            rows = list(arguments[:3])
            if layer in found:
                kept = (found[layer].x_ND, found[layer].experts_NK, found[layer].weights_NK)
                rows = [torch.cat(pair) for pair in zip(kept, rows, strict=True)]
            found[layer] = LayerRows(experts, *(part[-MOST_ROWS:].clone() for part in rows))

        handles.append(module.experts.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def greedy_levels(
    rows: LayerRows, target: float, limits_at: Callable[[Levels], ChannelLimits]
) -> Levels:
    """Return the levels of ``x`` and ``act`` whose share of left-out weights is ``target``.

    ``target`` is at most :data:`MOST`. ``limits_at`` gives the limits of the layer for any levels.
    """
    parts = rows.experts.fc1.shape[1] // rows.experts.fc2.shape[2]
    shares = {"x": parts / (parts + 1), "act": 1 / (parts + 1)}
    """Of an expert's weights."""
    dense_ND = rows.output(None)
    levels: Levels = dict.fromkeys(shares, 0.0)
    while (left := target - sum(shares[kind] * level for kind, level in levels.items())) > 1e-9:
        tries = [
            levels | {kind: min(MOST, level + min(STEP, left) / shares[kind])}
            for kind, level in levels.items()
            if level < MOST
        ]
        errors = [float((rows.output(limits_at(one)) - dense_ND).norm()) for one in tries]
        levels = tries[errors.index(min(errors))]
    return levels
