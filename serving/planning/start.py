"""The paragraph with which a server or a command starts."""

import logging
import sys
from collections.abc import Sequence

import torch

from ...moe.folders.folder import ModelFolder
from ..experts.copies import copies_bytes
from ..experts.options import StoreOptions
from ..experts.reading.plan import ReadPlan
from .bandwidth import memory_bandwidth
from .bounds import Copies, Speeds, bound_of
from .budget import Room
from .describe import Decision, describe, size
from .lossy import lossy_modes, lossy_sentences
from .sizes import sizes_of

log = logging.getLogger(__name__)


def show_start() -> None:
    """Let this process print the paragraphs of the models that it opens, on standard error."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.terminator = ""
        log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO)


def log_kv(text: str) -> None:
    """Log what keys and values get."""
    log.info("%s\n", text)


def log_start(
    folder: ModelFolder,
    dtype: torch.dtype,
    num_slots: Sequence[int] | None,
    reads: ReadPlan | None,
    options: StoreOptions,
    room: Room | None = None,
    host_bytes: int = 0,
    num_replicas: int = 1,
) -> None:
    """Log what was decided about experts, if anyone listens; it takes a moment to measure.

    ``num_slots`` and ``reads`` are those of a store, the slots as a number for each width of
    experts; None where all experts are in memory.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    sizes = sizes_of(folder, dtype)
    memory = memory_bandwidth()
    speeds = Speeds(memory, memory if reads is None else reads.bytes_per_s)
    if num_slots is None:
        num_slots = [pool.num_experts for pool in sizes.pools]
    slots = sum(num_slots)
    copies = Copies(num_slots=slots, num_in_host=host_bytes // sizes.expert_bytes)
    decision = Decision(
        sizes=sizes,
        num_slots=slots,
        slots_bytes=sizes.bytes_of(num_slots),
        room=room,
        host_bytes=host_bytes,
        num_replicas=num_replicas,
        reader=None if reads is None else reads.text,
        policy=_name(options.policy),
        predictor=None if options.predictor == "none" else _name(options.predictor),
        speeds=speeds,
        bound=bound_of(sizes, copies, speeds),
        lossy=_lossy(folder, dtype, options),
    )
    log.info("%s", describe(decision))


def log_lossy(folder: ModelFolder, dtype: torch.dtype, options: StoreOptions) -> None:
    """Log the lossy ways in which a model runs, where nothing is decided about its experts."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", "".join(f"{sentence}\n" for sentence in _lossy(folder, dtype, options)))


def _lossy(folder: ModelFolder, dtype: torch.dtype, options: StoreOptions) -> tuple[str, ...]:
    """Return what copies of experts take and the price of each lossy way."""
    sentences = lossy_sentences(folder.path, lossy_modes(folder, options))
    if options.fallback is None:
        return sentences
    taken = size(copies_bytes(options, dtype))
    return (f"Copies of all experts, for those that are missing, take {taken}.", *sentences)


def _name(part: object) -> str:
    return part if isinstance(part, str) else type(part).__name__
