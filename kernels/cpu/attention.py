"""Attention of single new positions on the C++ kernels.

B sequences with one row each, D model width, H head width.
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .library import TYPES, address, functions_for
from .structures import AttentionArguments, AttentionWeights


class Cache(Protocol):
    """The keys and values of one sequence over all layers."""

    length: int
    capacity: int
    addresses: "array[int]"
    """Of keys, then values, of each layer; ``[G, capacity, H]`` each."""

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more positions."""
        ...


class AttentionModules(NamedTuple):
    """The modules whose parameters are used; projections may have a bias."""

    input_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    output_norm: nn.Module
    q_norm: nn.Module | None
    """Over each head, or over all heads together; None = no norm."""
    k_norm: nn.Module | None
    """Like ``q_norm``."""
    attention: nn.Module
    """May have ``sinks``: a logit per query head that takes probability but has no value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionOptions:
    """The numbers of a layer's attention."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; they divide the query heads."""
    head_dim: int
    """Width of a head, even where it rotates."""
    scale: float
    """Factor on scores, above 0."""
    epsilon: float
    """Of all norms."""
    window: int | None = None
    """Positions a query sees, its own included; None = all."""
    clip: float | None = None
    """Largest magnitude of queries, keys and values, above 0; None = any."""
    rotates: bool = True
    """Rotate the halves of queries and keys against each other."""


PLACES = {
    "input_norm": ("input_norm", "weight"),
    "q": ("q", "weight"),
    "k": ("k", "weight"),
    "v": ("v", "weight"),
    "o": ("o", "weight"),
    "output_norm": ("output_norm", "weight"),
    "q_norm": ("q_norm", "weight"),
    "k_norm": ("k_norm", "weight"),
    "q_bias": ("q", "bias"),
    "k_bias": ("k", "bias"),
    "v_bias": ("v", "bias"),
    "o_bias": ("o", "bias"),
    "sinks": ("attention", "sinks"),
}
"""For each pointer of the structure: the module and the name of its parameter."""
POINTERS = tuple(PLACES)
NUM_NEEDED = 6
"""The first pointers; every model has these parameters."""
NOTHING: dict[str, Parameter | None] = {}
"""The parameters of a missing module."""


class RowAttention:
    """A decoder layer's attention and the norms before and after it, one cache per row.

    Holds the addresses of the parameters; :meth:`is_of` says whether they are still valid.
    """

    def __init__(self, modules: AttentionModules, options: AttentionOptions) -> None:
        # Looking parameters up as attributes is slow; these are the dictionaries behind them.
        self._parameters = [_parameters(module) for module in modules]
        by_name = dict(zip(AttentionModules._fields, self._parameters, strict=True))
        self._places = [(by_name[module], name) for module, name in PLACES.values()]
        self._pointers = self._pointers_now()
        tensors = [parameters.get(name) for parameters, name in self._places]
        present = [tensor for tensor in tensors if tensor is not None]
        is_whole = None not in self._pointers[:NUM_NEEDED]
        has_both_norms = (modules.q_norm is None) == (modules.k_norm is None)
        self._can_run = is_whole and has_both_norms and functions_for(*present) is not None
        self._type = TYPES.get(present[0].dtype)
        q_norm = by_name["q_norm"].get("weight")
        self._weights = AttentionWeights(
            type=self._type or 0,
            d_model=present[0].shape[0],
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
            head_dim=options.head_dim,
            window=options.window or 0,
            norms_heads=q_norm is not None and len(q_norm) == options.head_dim,
            rotates=options.rotates,
            epsilon=options.epsilon,
            scale=options.scale,
            clip=options.clip or 0.0,
            **dict(zip(POINTERS, self._pointers, strict=True)),
        )

    def _pointers_now(self) -> list[int | None]:
        return [address(parameters.get(name)) for parameters, name in self._places]

    def is_of(self, modules: AttentionModules) -> bool:
        """Say whether these are still the same modules, with parameters at the same addresses."""
        for module, parameters in zip(modules, self._parameters, strict=True):
            if _parameters(module) is not parameters:
                return False
        return self._pointers_now() == self._pointers

    def run(
        self, x_BD: Tensor, rope: tuple[Tensor, Tensor], layer: int, step: "RowStep"
    ) -> tuple[Tensor, Tensor] | None:
        """Return the residual stream after attention and its norm, or None if it cannot be run.

        Stores the new position in the caches; they count it once the forward is over.
        """
        functions = functions_for(x_BD, *rope) if self._can_run else None
        if functions is None or TYPES[x_BD.dtype] != self._type:
            return None
        x_out_BD, normed_BD = torch.empty_like(x_BD), torch.empty_like(x_BD)
        arguments = AttentionArguments(
            layer=layer,
            sequences=x_BD.shape[0],
            threads=torch.get_num_threads(),
            x=x_BD.data_ptr(),
            cosine=rope[0].data_ptr(),
            sine=rope[1].data_ptr(),
            caches=step.caches.buffer_info()[0],
            lengths=step.lengths.buffer_info()[0],
            capacities=step.capacities.buffer_info()[0],
            x_out=x_out_BD.data_ptr(),
            normed=normed_BD.data_ptr(),
        )
        functions.moeyard_attend(ctypes.byref(self._weights), ctypes.byref(arguments))
        return x_out_BD, normed_BD


def _parameters(module: nn.Module | None) -> dict[str, Parameter | None]:
    return NOTHING if module is None else module._parameters


class RowStep:
    """The caches of a step's sequences, with room for one more position in each."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        for cache in caches:
            cache.reserve(1)
        self._addresses = [cache.addresses for cache in caches]  # keeps them alive
        self.caches = array("q", (addresses.buffer_info()[0] for addresses in self._addresses))
        self.lengths = array("q", (cache.length for cache in caches))
        self.capacities = array("q", (cache.capacity for cache in caches))
