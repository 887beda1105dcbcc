"""Attention of single new positions on the C++ kernels.

B sequences with one row each, D model width, H head width.
"""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .library import TYPES, functions_for
from .structures import AttentionArguments, AttentionWeights


class Cache(Protocol):
    """The keys and values of one sequence over all layers."""

    length: int
    capacity: int
    addresses: "array[int]"
    """Of keys, then values, of each layer; ``[G, capacity, H]`` each."""

    def reserve(self, count: int) -> None:
        """Make room for so many positions more."""
        ...


class CppAttention:
    """A decoder layer's attention with both norms around it, for rows that have a cache each.

    Holds the addresses of the parameters, and says with :meth:`is_of` whether they still hold.
    """

    def __init__(
        self, modules: Sequence[nn.Module], num_heads: int, num_kv_heads: int, epsilon: float
    ) -> None:
        """Take input norm, q, k, v and output projection, q and k norm, output norm."""
        # Looking parameters up as attributes is slow; these are the dictionaries behind them.
        self._parameters = [module._parameters for module in modules]
        weights = self._weights()
        self._pointers = [weight.data_ptr() for weight in weights]
        self._can_run = functions_for(*weights) is not None
        self._type = TYPES.get(weights[0].dtype)
        sizes = (weights[0].shape[0], num_heads, num_kv_heads, weights[5].shape[0])
        self._fields = (self._type, *sizes, epsilon, *self._pointers)

    def _weights(self) -> list[Tensor]:
        return [parameters["weight"] for parameters in self._parameters]  # type: ignore[misc]

    def is_of(self, modules: Iterable[nn.Module]) -> bool:
        """Say whether these are still the modules, and their parameters where they were."""
        for module, parameters in zip(modules, self._parameters, strict=True):
            if module._parameters is not parameters:
                return False
        return [weight.data_ptr() for weight in self._weights()] == self._pointers

    def run(
        self, x_BD: Tensor, rope: tuple[Tensor, Tensor], layer: int, step: "CacheStep"
    ) -> tuple[Tensor, Tensor] | None:
        """Return the residual stream after attention and its norm, or None if it cannot be run.

        The caches receive the new position, which they count as theirs once the forward is over.
        """
        functions = functions_for(x_BD, *rope) if self._can_run else None
        if functions is None or TYPES[x_BD.dtype] != self._type:
            return None
        x_out_BD, normed_BD = torch.empty_like(x_BD), torch.empty_like(x_BD)
        arguments = AttentionArguments(
            *(layer, x_BD.shape[0], torch.get_num_threads(), x_BD.data_ptr()),
            *(table.data_ptr() for table in rope),
            *(array_.buffer_info()[0] for array_ in (step.caches, step.lengths, step.capacities)),
            *(x_out_BD.data_ptr(), normed_BD.data_ptr()),
        )
        weights = AttentionWeights(*self._fields)
        functions.moeyard_attend(ctypes.byref(weights), ctypes.byref(arguments))
        return x_out_BD, normed_BD


class CacheStep:
    """The caches of a step's sequences, with room for one more position in each."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        for cache in caches:
            cache.reserve(1)
        self._addresses = [cache.addresses for cache in caches]  # alive as long as this is
        self.caches = array("q", (addresses.buffer_info()[0] for addresses in self._addresses))
        self.lengths = array("q", (cache.length for cache in caches))
        self.capacities = array("q", (cache.capacity for cache in caches))
