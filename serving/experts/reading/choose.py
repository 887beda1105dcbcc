"""Decide how experts are read from a folder."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ....errors import ConfigError, ModelFileError
from ....moe.folders.extents import Chunk
from ....moe.folders.folder import ModelFolder
from .plan import MODE_TEXT, READERS, Mode, ReadPlan, rate
from .probe import MAX_BYTES, Probe, Way

SMALL_BYTES = 4 << 20
"""Folders with fewer bytes of experts are not probed."""
DEFAULT_THREADS = 4


@dataclass(frozen=True, slots=True)
class _Case:
    """What the choice depends on, next to measurements."""

    reader: str
    """What the user asks for."""
    has_direct: bool
    share: float
    """Of the experts on disk that the page cache can hold, from 0 to 1."""

    @property
    def modes(self) -> Sequence[Mode]:
        """What is worth comparing."""
        if self.reader == "direct":
            return ("direct",)
        if self.reader == "buffered" or self.share == 1 or not self.has_direct:
            return ("buffered",)
        return ("buffered", "direct")

    @property
    def is_cold(self) -> bool:
        """Whether most reads will find nothing in the page cache."""
        return self.share < 1


def check_reader(reader: str) -> None:
    """Raise :class:`ConfigError` for a reader that there is not."""
    if reader not in READERS:
        raise ConfigError(f"expert-reader is {reader!r}; use one of {', '.join(READERS)}.")


def plan_reads(folder: ModelFolder, reader: str, free_bytes: int) -> ReadPlan:
    """Return how to read a folder's experts, and prepare the folder for it.

    ``free_bytes`` is the memory that is left for the page cache when the model has all it needs.
    Reads up to 512 MiB of experts, for about half a second, to compare threads and the page cache
    with direct I/O. Raises :class:`ModelFileError` where they cannot be read.
    """
    check_reader(reader)
    has_direct = reader != "buffered" and folder.files.open_direct()
    if reader == "direct" and not has_direct:
        raise ConfigError(
            f"expert-reader is 'direct', but the file system of {folder.path} offers no direct "
            "I/O; use auto or buffered."
        )
    total = _stored_bytes(folder)
    case = _Case(reader, has_direct, min(1.0, free_bytes / total))
    try:
        plan = _decide(_chunks(folder), total, case)
    except OSError as error:
        raise ModelFileError(
            f"experts of {folder.path} could not be read: {error}; copy the folder again."
        ) from None
    folder.is_direct = plan.mode == "direct"
    return plan


def _decide(chunks: Sequence[Chunk], total: int, case: _Case) -> ReadPlan:
    probe = Probe(chunks, case.is_cold)
    if total < SMALL_BYTES:
        way = Way(case.modes[0], 1, 0.0)
        bytes_per_s = probe.rate(way, max_bytes=total)
        return ReadPlan(way.mode, DEFAULT_THREADS, bytes_per_s, "there are few of them")
    ways = probe.compare(case.modes)
    best = max(ways, key=lambda way: _with_cache(way, case.share))
    return ReadPlan(best.mode, best.threads, probe.rate(best), _reason(case, ways, best))


def _with_cache(way: Way, share: float) -> float:
    """Return the rate of a way when the page cache holds a share of the experts."""
    if way.mode == "direct":
        return way.bytes_per_s
    return way.bytes_per_s / max(1 - share, 0.01)


def _reason(case: _Case, ways: Sequence[Way], best: Way) -> str:
    if case.reader != "auto":
        return "expert-reader says so"
    if case.share == 1:
        return "all of them fit into the memory that is free next to the slots"
    if not case.has_direct:
        return "the file system offers no direct I/O"
    (other,) = (way for way in ways if way.mode != best.mode)
    return (
        f"a burst of reads gets {rate(best.bytes_per_s)} that way and {rate(other.bytes_per_s)} "
        f"{MODE_TEXT[other.mode]}, and the cache can hold {case.share:.0%} of the experts"
    )


def _chunks(folder: ModelFolder) -> list[Chunk]:
    """Return enough chunks of experts for a probe, drawn at random but always the same."""
    config = folder.config
    assert config.moe is not None, "only MoE models have experts"
    keys = [(layer, e) for layer in config.moe_layers for e in range(config.moe.num_experts)]
    random.Random(0).shuffle(keys)
    chunks: list[Chunk] = []
    num_bytes = 0
    for layer, expert in keys:
        found = folder.expert_chunks(layer, expert)
        chunks += found
        num_bytes += sum(chunk.end - chunk.start for chunk in found)
        if num_bytes >= MAX_BYTES:
            break
    return chunks


def _stored_bytes(folder: ModelFolder) -> int:
    config = folder.config
    assert config.moe is not None, "only MoE models have experts"
    first = folder.expert_chunks(config.moe_layers[0], 0)
    of_one = sum(chunk.end - chunk.start for chunk in first)
    return of_one * config.moe.num_experts * len(config.moe_layers)
