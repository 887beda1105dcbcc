"""The flat, ragged batch every decoder call takes. T tokens, B sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from ..kernels.values.memory import to_device
from .adapters.adapter import Adapter
from .adapters.rows import AdapterRows, adapter_rows
from .experts.core_channels import CoreChannels
from .experts.core_rows import CoreRows, core_rows
from .kv_cache import KVCache
from .routers.groups import previous_rows


@dataclass(frozen=True, slots=True)
class Packing:
    """Sequences without caches, grouped by padded length for attention (models/documents.py)."""

    rows_P: Tensor
    """int64: the batch's row at each place of the concatenated groups."""
    places_T: Tensor
    """int64: the place of each row."""
    groups: tuple[tuple[int, int], ...]
    """(number of sequences, padded length) of each group."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Concatenated sequences: training documents, prompts, chunks and single decode steps."""

    ids_T: Tensor
    """int64 token ids."""
    positions_T: Tensor
    """int64 position of each token in its sequence."""
    lengths: tuple[int, ...]
    """Rows of each sequence in this batch; they sum to T."""
    caches: tuple[KVCache, ...] | None = None
    """One cache per sequence; None if nothing came before and nothing is kept."""
    packing: Packing | None = None
    """How attention groups sequences; None = one by one, or all together if uniform."""
    tasks_T: Tensor | None = None
    """int64: each row's task, for routers that read it."""
    timesteps_T: Tensor | None = None
    """Each row's time in a diffusion process, for routers that read it."""
    draw_keys: tuple[int, ...] | None = None
    """A number for each sequence that routers draw from in training (routers/draws.py)."""
    routes: Mapping[int, Tensor] | None = None
    """By index of each MoE layer: int32 ``[T, K]``, recorded experts to visit instead of the
    routers' choice; -1 = none (routes/replay.py)."""
    previous_ids_T: Tensor | None = None
    """The token id before each row, -1 for none, for routers that read it."""
    adapters: AdapterRows | None = None
    """Which rows go through which adapter; None = all go through the weights alone."""
    core: CoreRows | None = None
    """Which rows use core channels of experts; None = all use all."""

    @property
    def is_uniform(self) -> bool:
        """True when all sequences have the same number of rows."""
        return len(set(self.lengths)) == 1

    def to(self, device: torch.device) -> "Batch":
        """Return a batch without caches, made on the host, on another device."""
        assert self.caches is None, "caches stay on their device"
        packing = self.packing
        if packing is not None:
            rows_P, places_T = (to_device(t, device) for t in (packing.rows_P, packing.places_T))
            packing = replace(packing, rows_P=rows_P, places_T=places_T)
        ids_T, positions_T = (to_device(t, device) for t in (self.ids_T, self.positions_T))
        return replace(self, ids_T=ids_T, positions_T=positions_T, packing=packing)

    def subset(self, sequences: Sequence[int], rows_N: Tensor) -> "Batch":
        """Return the batch of some sequences, whose rows are ``rows_N``."""
        caches = self.caches
        return Batch(
            ids_T=self.ids_T[rows_N],
            positions_T=self.positions_T[rows_N],
            lengths=tuple(self.lengths[index] for index in sequences),
            caches=None if caches is None else tuple(caches[index] for index in sequences),
            tasks_T=None if self.tasks_T is None else self.tasks_T[rows_N],
            timesteps_T=None if self.timesteps_T is None else self.timesteps_T[rows_N],
            routes=None if self.routes is None else {i: r[rows_N] for i, r in self.routes.items()},
            adapters=None if self.adapters is None else self.adapters.subset(sequences),
            core=None if self.core is None else self.core.subset(sequences),
        )

    def with_previous_ids(self) -> "Batch":
        """Return the batch with ``previous_ids_T``, those of first rows from the caches."""
        previous_T = previous_rows(self.ids_T, self.lengths)
        start = 0
        for cache, length in zip(self.caches or (), self.lengths, strict=False):
            if length and cache.length:
                previous_T[start] = cache.last_id()
            start += length
        return replace(self, previous_ids_T=previous_T)

    def advance_caches(self) -> None:
        """Tell the caches that all layers have stored these rows."""
        if self.caches is None:
            return
        if self.previous_ids_T is not None:
            ids = self.ids_T.split(list(self.lengths))
            for cache, ids_L in zip(self.caches, ids, strict=True):
                cache.keep_ids(ids_L)
        for cache, length in zip(self.caches, self.lengths, strict=True):
            cache.length += length


def batch_of(
    sequences: Sequence[Tensor],
    caches: Sequence[KVCache] | None = None,
    adapters: Sequence[Adapter | None] | None = None,
    cores: Sequence[CoreChannels | None] | None = None,
) -> Batch:
    """Concatenate 1-D id tensors, each continuing its cache if there are caches.

    ``adapters`` has one for each sequence, None for the model alone. ``cores`` has the core
    channels of each, None for all channels.
    """
    lengths = tuple(len(ids) for ids in sequences)
    starts = [0] * len(sequences) if caches is None else [cache.length for cache in caches]
    spans = (range(start, start + n) for start, n in zip(starts, lengths, strict=True))
    positions_T = torch.tensor(list(chain.from_iterable(spans)))
    return Batch(
        ids_T=torch.cat(list(sequences)),
        positions_T=to_device(positions_T, sequences[0].device),
        lengths=lengths,
        caches=None if caches is None else tuple(caches),
        adapters=adapter_rows(adapters, lengths),
        core=core_rows(cores, lengths, starts),
    )


def batch_of_rows(ids_BL: Tensor) -> Batch:
    """Concatenate the rows of ``[B, L]`` ids."""
    num_rows, length = ids_BL.shape
    positions_T = torch.arange(length, device=ids_BL.device).repeat(num_rows)
    return Batch(ids_BL.reshape(-1), positions_T, (length,) * num_rows)
