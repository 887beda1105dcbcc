"""The input and the output of a router.

T tokens, D model width, E experts, K choices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from ...kernels.values.choice import Choices
from ...kernels.values.choice import count_choices as count_choices

Reduce = Callable[[Tensor], Tensor]
"""Sum a tensor of counts over all ranks that share the batch; the identity on one process."""


class Lookahead(StrEnum):
    """What a router reads, and so how early its choice is known."""

    TOKEN = "token"
    """Token ids only (hash): known before the forward starts."""
    PREVIOUS_BLOCK = "previous_block"
    """What the previous block's experts read (pre-gating)."""
    ATTENTION_INPUT = "attention_input"
    """The raw residual entering the layer."""
    FFN_INPUT = "ffn_input"
    """What the experts themselves read (ordinary routers)."""


@dataclass(frozen=True, slots=True)
class RouterInput:
    """What a router may read; a router takes what its ``lookahead`` needs."""

    x_TD: Tensor | None = None
    """Hidden rows at the router's look-ahead point."""
    ids_T: Tensor | None = None
    """Token ids."""
    positions_T: Tensor | None = None
    """Position of each row in its sequence."""
    valid_T: Tensor | None = None
    """False for rows that must be neither routed nor counted; None = all rows are real."""
    lengths: tuple[int, ...] | None = None
    """Rows of each sequence, in order; None = all rows are one sequence."""
    tasks_T: Tensor | None = None
    """int64: the task that each row belongs to."""
    timesteps_T: Tensor | None = None
    """Time of the diffusion process of each row, from 0 upwards."""
    draw_keys: tuple[int, ...] | None = None
    """A number for each sequence from which routers draw at random (draws.py); None = from torch's
    own generator."""
    previous_ids_T: Tensor | None = None
    """The token id before each row, -1 at the beginning of a text; None = nothing came before the
    first row of each sequence."""


@dataclass(slots=True)
class Routing:
    """Which experts each token visits, and the values for losses and statistics."""

    experts_TK: Tensor
    """int32 logical expert ids; -1 = none."""
    weights_TK: Tensor
    """Weight of each choice in the combined output."""
    counts_E: Tensor
    """int64: routed rows of each expert, no gradient."""
    num_tokens: Tensor
    """int64 scalar: valid rows, no gradient."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """This rank's values for the router's losses, by name and with gradient; empty outside
    training."""
    extra_counts: dict[str, Tensor] = field(default_factory=dict)
    """int64: other counts that the losses need over the global batch, in addition to ``counts_E``
    and ``num_tokens``. The names and shapes are the same on all ranks."""


register_dataclass(
    Routing,
    field_names=[
        "experts_TK",
        "weights_TK",
        "counts_E",
        "num_tokens",
        "extras",
        "extra_counts",
    ],
    drop_field_names=[],
)


def count_tokens(valid_T: Tensor | None, experts_TK: Tensor) -> Tensor:
    """Return the number of valid rows as an int64 scalar."""
    if valid_T is None:
        # Filled on the device: copying a number to the device would wait for it.
        shape, device = (), experts_TK.device
        return torch.full(shape, experts_TK.shape[0], dtype=torch.int64, device=device)
    return valid_T.sum()


def routing_of(choices: Choices, valid_T: Tensor | None) -> Routing:
    """Return what a kernel chose, with the sums for losses if it was asked for them."""
    return Routing(
        experts_TK=choices.experts_TK,
        weights_TK=choices.weights_TK,
        counts_E=choices.counts_E,
        num_tokens=count_tokens(valid_T, choices.experts_TK),
        extras={} if choices.sums is None else choices.sums._asdict(),
    )
