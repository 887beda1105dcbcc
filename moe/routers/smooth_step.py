"""The smooth-step function, and routings of gates that weigh every expert and reach exact zeros.

T tokens, E experts.
"""

import torch
from torch import Tensor

from ...kernels.values.choice import where_valid
from .routing import Routing, count_choices, count_tokens
from .split_rows import choices_of, weights_of

TINY = 1e-6
"""Keeps logarithms of zero finite (the released code's value)."""


def smooth_step(t: Tensor, width: float) -> Tensor:
    """Return a cubic step from 0 to 1 around 0 (Hazimeh et al. 2020, "The Tree Ensemble Layer").

    It is exactly 0 below ``-width / 2`` and exactly 1 above ``width / 2``; its slope is continuous.
    """
    u = (t / width).clamp(-0.5, 0.5)
    return (-2 * u**3 + 1.5 * u + 0.5).clamp(0, 1)


def entropy(probabilities: Tensor) -> Tensor:
    """Return ``sum -p log(p + 1e-6)`` over the last dimension."""
    return -(probabilities * (probabilities + TINY).log()).sum(dim=-1)


def uniform(shape: torch.Size, bound: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw from U(-bound, bound) in fp32, on the generator's device or the CPU."""
    return (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * bound


def routing_of_weights(
    weights_TE: Tensor, valid_T: Tensor | None, given_TK: Tensor | None = None
) -> Routing:
    """Return the routing to every expert whose weight is above zero, or to those given."""
    if given_TK is None:
        chosen_TE = weights_TE.detach() > 0
        if valid_T is not None:
            chosen_TE = chosen_TE & valid_T.unsqueeze(-1)
        experts_TK, weights_TK = choices_of(chosen_TE, weights_TE)
    else:
        experts_TK = where_valid(valid_T, given_TK)
        weights_TK = weights_of(experts_TK, weights_TE)
    return Routing(
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        counts_E=count_choices(experts_TK, weights_TE.shape[1]),
        num_tokens=count_tokens(valid_T, experts_TK),
    )


def valid_sum(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Return the sum over valid rows."""
    return (values_T if valid_T is None else torch.where(valid_T, values_T, 0)).sum()
