"""What it costs to narrow one expert: an estimate for each, from one pass over a text.

N rows, D model width, K choices, E experts, B windows, L tokens each, R rows of a choice.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.experts import expert_mlp
from ...moe.batch import batch_of_rows
from ...moe.models.decoder import Decoder
from ...progress import Progress
from .search import Key
from .weights import TwoWidths

ROWS = 1024
"""Tokens of a pass, unless one window is longer: activations are kept for backward."""


def measure_importance(
    decoder: Decoder, widths: dict[int, TwoWidths], ids_T: Tensor, length: int
) -> dict[Key, float]:
    """Return how much the loss is expected to suffer if one expert alone is narrow.

    EdgeMoE narrows one expert at a time and measures the loss. That is a pass over the text for
    each expert; here one pass does for all. In it, the weights are exact. For each row that chose
    expert e, ``d`` is the change of the layer's output when e is narrow instead of wide, and ``g``
    the gradient of the loss with respect to that output. The estimate is the sum of ``(g . d)^2``
    over rows: the second-order change of the loss, with squared gradients for its curvature, as
    in empirical Fisher information. It is not in nats; only its order matters.

    ``ids_T`` are tokens, read in windows of ``length`` as held-out text is.
    """
    probes = {layer: _Probe(widths[layer]) for layer, _ in decoder.moe_layers()}
    num_targets = ids_T.numel() - 1
    starts = [start for start in range(0, num_targets, length) if start + length <= num_targets]
    per_pass = max(1, ROWS // length)
    with ExitStack() as hooks, Progress("measuring experts", len(starts) * length) as progress:
        hooks.callback(decoder.embed_tokens.register_forward_hook(_with_gradient).remove)
        for layer, module in decoder.moe_layers():
            handle = module.experts.register_forward_hook(probes[layer].see)
            hooks.callback(handle.remove)
        for first in range(0, len(starts), per_pass):
            windows = starts[first : first + per_pass]
            inputs_BL = torch.stack([ids_T[start : start + length] for start in windows])
            targets_BL = torch.stack([ids_T[start + 1 : start + 1 + length] for start in windows])
            with torch.enable_grad():
                hidden_ND = decoder(batch_of_rows(inputs_BL)).hidden_TD
                logits_NV = decoder.logits(hidden_ND).float()
                F.cross_entropy(logits_NV, targets_BL.flatten(), reduction="sum").backward()
            progress.advance(inputs_BL.numel())
    return {
        (layer, expert): value
        for layer, probe in probes.items()
        for expert, value in enumerate(probe.sums_E.tolist())
    }


def _with_gradient(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """Let gradients flow through a model whose parameters want none."""
    return output.requires_grad_()


class _Probe:
    """Sees a layer's experts at work, and the gradient of what they return."""

    def __init__(self, widths: TwoWidths) -> None:
        self._widths = widths
        self.sums_E = torch.zeros(widths.wide.num_slots, dtype=torch.float64)

    def see(self, module: torch.nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Remember a forward until its gradient comes."""
        x_ND, experts_NK, weights_NK = (part.detach() for part in arguments[:3])
        add: Callable[[Tensor], None] = partial(self._add, x_ND, experts_NK, weights_NK)
        output.register_hook(add)

    def _add(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, grad_ND: Tensor) -> None:
        for k in range(experts_NK.shape[1]):
            choice_N1, share_N1 = experts_NK[:, k : k + 1], weights_NK[:, k : k + 1]
            rows = x_ND, choice_N1.contiguous(), share_N1.contiguous()
            with torch.no_grad():
                narrow_ND = expert_mlp(*rows, self._widths.narrow).float()
                change_ND = narrow_ND - expert_mlp(*rows, self._widths.wide).float()
                effect_N = (grad_ND.float() * change_ND).sum(dim=1).double()
            has_one_N = choice_N1[:, 0] >= 0
            chosen_R = choice_N1[has_one_N, 0].long()
            self.sums_E.index_add_(0, chosen_R, effect_N[has_one_N] ** 2)
