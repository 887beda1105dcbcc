"""A decoder layer's attention with the norms around it, on the first backend that supports it.

N rows of a part, D model width.

To add a backend: write a class with ``run``, and put it before ``ModuleBackend`` in ``backends``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .cpp import RowBackend
from .parts import Part

Modules = Mapping[str, Any]
"""A decoder layer's modules by name; a dictionary, because attributes of modules are slow."""


class AttentionBackend(Protocol):
    """One way to run ``x + attention(norm(x))`` and the norm that the MLP reads."""

    def run(self, modules: Modules, x_ND: Tensor, part: Part) -> tuple[Tensor, Tensor] | None:
        """Return the residual stream after attention and its norm, both ``[N, D]``.

        None if the backend does not support this layer or this part. Stores the new positions in
        the caches, which count them once the forward is over.
        """
        ...


class ModuleBackend:
    """The layer's modules one after the other; supports everything."""

    def run(self, modules: Modules, x_ND: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention and its norm."""
        normed_ND = modules["input_layernorm"](x_ND)
        x_ND = x_ND + modules["self_attn"](normed_ND, part.batch, part.rope, part.new)
        return x_ND, modules["post_attention_layernorm"](x_ND)


def backends(layer: int, epsilon: float) -> tuple[AttentionBackend, ...]:
    """Return the backends that ``layer`` tries in turn; ``epsilon`` is that of all its norms."""
    return RowBackend(layer, epsilon), ModuleBackend()


def run_attention(
    tried: Sequence[AttentionBackend], modules: Modules, x_TD: Tensor, parts: Sequence[Part]
) -> tuple[Tensor, Tensor]:
    """Return the residual stream after attention, and its norm, which the MLP reads."""
    if len(parts) == 1:
        return _run_part(tried, modules, x_TD, parts[0])
    x_out_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    for part in parts:
        rows_N = part.rows_N
        x_out_TD[rows_N], normed_TD[rows_N] = _run_part(tried, modules, x_TD[rows_N], part)
    return x_out_TD, normed_TD


def _run_part(
    tried: Sequence[AttentionBackend], modules: Modules, x_ND: Tensor, part: Part
) -> tuple[Tensor, Tensor]:
    for backend in tried:
        found = backend.run(modules, x_ND, part)
        if found is not None:
            return found
    raise AssertionError("the last backend supports everything")
