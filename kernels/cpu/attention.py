"""A layer's attention with its norms and projections, on the C++ kernels.

T rows of all sequences, D model width, H head width.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .cached_rows import NewRows, fits_kernels
from .library import TYPES, address, functions_for
from .structures import AttentionArguments, AttentionWeights


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
    """A decoder layer's attention and the norms before and after it, for sequences with caches.

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
        self._can_run = (
            is_whole
            and has_both_norms
            and fits_kernels(options.head_dim, present[0].dtype)
            and functions_for(*present) is not None
        )
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
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], layer: int, new: NewRows
    ) -> tuple[Tensor, Tensor] | None:
        """Return the residual stream after attention and its norm, or None if it cannot be run.

        Stores the new positions in the caches; they count them once the forward is over.
        """
        functions = functions_for(x_TD, *rope) if self._can_run else None
        if functions is None or TYPES[x_TD.dtype] != self._type:
            return None
        x_out_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        arguments = AttentionArguments(
            to=new.address,
            layer=layer,
            threads=torch.get_num_threads(),
            x=x_TD.data_ptr(),
            cosine=rope[0].data_ptr(),
            sine=rope[1].data_ptr(),
            x_out=x_out_TD.data_ptr(),
            normed=normed_TD.data_ptr(),
        )
        functions.moeyard_attention(ctypes.byref(self._weights), ctypes.byref(arguments))
        return x_out_TD, normed_TD


def _parameters(module: nn.Module | None) -> dict[str, Parameter | None]:
    return NOTHING if module is None else module._parameters
