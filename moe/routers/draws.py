"""Random numbers of routers: the same on any number of ranks, and when a step is computed again.

A sequence's numbers depend on its token ids, the router and the step, not on where the sequence is
computed. Recomputed layers and resumed runs draw them again.

T tokens, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .groups import group_lengths
from .routing import RouterInput

Draw = Callable[[int, torch.Generator | None], Tensor]
"""Draws the numbers of one sequence: its rows and a generator in, ``[rows, ...]`` out."""

MIX = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd multiplier with many bits (Knuth); products wrap around in int64."""


def sequence_keys(ids_T: Tensor, lengths: Sequence[int]) -> tuple[int, ...]:
    """Return a number for each sequence that depends on its token ids and their order."""
    places_T = torch.arange(1, len(ids_T) + 1, device=ids_T.device)
    keys = []
    for ids, places in zip(ids_T.split(list(lengths)), places_T.split(list(lengths)), strict=True):
        places = places - places[:1]
        keys.append((((ids + 1) * MIX + places) * MIX).bitwise_xor(ids * MIX).sum())
    return tuple(torch.stack(keys).tolist()) if keys else ()


def draw_rows(
    router_input: RouterInput, num_rows: int, step: int, stream: int, draw: Draw
) -> Tensor:
    """Return ``draw``'s numbers for all rows.

    ``stream`` tells routers and their purposes apart. Without ``draw_keys`` (a layer alone) the
    numbers come from torch's own generator.
    """
    keys = router_input.draw_keys
    if keys is None:
        return draw(num_rows, None)
    lengths = group_lengths(router_input, num_rows)
    parts = []
    for key, length in zip(keys, lengths, strict=True):
        seed = ((key * MIX + step) * MIX + stream) % (1 << 63)
        parts.append(draw(length, torch.Generator().manual_seed(seed)))
    return torch.cat(parts) if parts else draw(0, None)
