"""Drafted ids as rows of a forward. This file alone knows how rows of one text run together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ...kernels.attention import can_attend_rows
from ..adapters.adapter import Adapter
from ..batch import batch_of
from ..drafts.speculation import Speculation
from ..drafts.table import drafter_named
from ..drafts.tally import DraftTally
from ..experts.core_channels import CoreChannels
from ..kv_cache import CachePosition, KVCache
from .decoder import Decoder, DecoderOutput


@dataclass(frozen=True, slots=True)
class TextRows:
    """What a forward reads of one text."""

    cache: KVCache
    ids: tuple[int, ...]
    adapter: Adapter | None
    num_drafted: int = 0
    """How many of the last ids are drafted; the one before them is then the text's last id."""
    core: CoreChannels | None = None


def run_rows(decoder: Decoder, texts: Sequence[TextRows]) -> DecoderOutput:
    """Run the rows of all texts and advance their caches.

    A row that follows others of its text has the bits of a single step: each is a sequence of one
    row that ends before the next (:class:`.CachePosition`). Caches must have room.
    """
    ids: list[torch.Tensor] = []
    caches: list[KVCache] = []
    adapters: list[Adapter | None] = []
    cores: list[CoreChannels | None] = []
    for text in texts:
        ids_N = torch.tensor(text.ids)
        if text.num_drafted == 0:
            ids.append(ids_N)
            caches.append(text.cache)
            adapters.append(text.adapter)
            cores.append(text.core)
            continue
        text.cache.keep_ids(ids_N)
        ids += ids_N.split(1)
        start = text.cache.length
        caches += [CachePosition(text.cache, start + row) for row in range(len(ids_N))]
        adapters += [text.adapter] * len(ids_N)
        cores += [text.core] * len(ids_N)
    output: DecoderOutput = decoder(batch_of(ids, caches, adapters, cores))
    for text in texts:
        if text.num_drafted:
            text.cache.length += len(text.ids)
    return output


def open_speculation(
    name: str, num_rows: int, decoder: Decoder, make_tally: Callable[[], DraftTally]
) -> Speculation | None:
    """Return the speculation of a drafter with at most ``num_rows`` drafted rows; None for none.

    Raises :class:`ConfigError` for unknown names, and where rows depend on each other.
    """
    make_drafter = drafter_named(name)
    if make_drafter is None:
        return None
    check_rows(num_rows, decoder.norm.weight.device)
    _check_rows_alone(decoder)
    return Speculation(make_drafter, num_rows, make_tally())


def check_rows(num_rows: int, device: torch.device) -> None:
    """Raise :class:`ConfigError` for a number of drafted rows, or a device, that cannot be."""
    if num_rows < 1:
        raise ConfigError(f"speculative-rows is {num_rows}; use a number from 1 upwards.")
    if device.type != "cpu":
        raise ConfigError(
            f"speculative is for models on the CPU, but this one is on '{device}'; leave "
            "speculative out."
        )


def _check_rows_alone(decoder: Decoder) -> None:
    """Raise :class:`ConfigError` where a row's bits depend on how many rows run with it."""
    weight = decoder.norm.weight
    with torch.inference_mode():
        is_alone = weight.dtype == torch.bfloat16 or can_attend_rows((weight, weight))
    if not is_alone:
        raise ConfigError(
            "speculative needs the C++ kernels in fp32, because the digits of torch's products "
            "depend on the other rows; use bf16, or leave speculative out."
        )
