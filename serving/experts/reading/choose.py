"""Decide how experts are read from a folder."""

import random
from collections.abc import Sequence

from ....errors import ConfigError
from ....moe.folders.extents import Chunk
from ....moe.folders.folder import ModelFolder
from .plan import MODE_TEXT, READERS, Mode, ReadPlan, rate
from .probe import MAX_BYTES, Way, compare, measure

SMALL_BYTES = 4 << 20
"""Folders with fewer bytes of experts are not probed."""
DEFAULT_THREADS = 4


def check_reader(reader: str) -> None:
    """Raise :class:`ConfigError` for a reader that there is not."""
    if reader not in READERS:
        raise ConfigError(f"expert-reader is {reader!r}; use one of {', '.join(READERS)}.")


def plan_reads(folder: ModelFolder, reader: str, free_bytes: int) -> ReadPlan:
    """Return how to read a folder's experts, and prepare the folder for it.

    ``free_bytes`` is the memory that is left for the page cache when the model has all it needs.
    Reads up to 256 MiB of experts, for about half a second, to compare threads and the page cache
    with direct I/O. ``OSError`` where they cannot be read.
    """
    check_reader(reader)
    chunks, total = _chunks(folder), _stored_bytes(folder)
    has_direct = reader != "buffered" and folder.files.open_direct()
    if reader == "direct" and not has_direct:
        raise ConfigError(
            f"expert-reader is 'direct', but the file system of {folder.path} offers no direct "
            "I/O; use auto or buffered."
        )
    fits = total <= free_bytes
    modes = _modes(reader, has_direct, fits)
    is_cold = not fits
    if total < SMALL_BYTES:
        plan = ReadPlan(modes[0], DEFAULT_THREADS, _one_by_one(chunks), "there are few of them")
    else:
        share = min(1.0, free_bytes / total)
        ways = compare(chunks, modes, is_cold)
        best = max(ways, key=lambda way: _with_cache(way, share))
        bytes_per_s = measure(chunks, best, is_cold)
        reason = _reason(reader, has_direct, ways, best, share)
        plan = ReadPlan(best.mode, best.threads, bytes_per_s, reason)
    folder.is_direct = plan.mode == "direct"
    return plan


def _modes(reader: str, has_direct: bool, fits: bool) -> Sequence[Mode]:
    if reader == "direct":
        return ("direct",)
    if reader == "buffered" or fits or not has_direct:
        return ("buffered",)
    return ("buffered", "direct")


def _with_cache(way: Way, share: float) -> float:
    """Return the rate of a way when the page cache holds a share of the experts."""
    if way.mode == "direct":
        return way.bytes_per_s
    return way.bytes_per_s / max(1 - share, 0.01)


def _reason(
    reader: str, has_direct: bool, ways: Sequence[Way], best: Way, share: float
) -> str:
    if reader != "auto":
        return "expert-reader says so"
    if share == 1:
        return "all of them fit into the memory that is free next to the slots"
    if not has_direct:
        return "the file system offers no direct I/O"
    (other,) = (way for way in ways if way.mode != best.mode)
    compared = (
        f"reads take that way {rate(best.bytes_per_s)} when nothing stops them, and "
        f"{rate(other.bytes_per_s)} {MODE_TEXT[other.mode]}"
    )
    return f"{compared}, which can hold {share:.0%} of the experts"


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


def _one_by_one(chunks: Sequence[Chunk]) -> float:
    return measure(chunks, Way("buffered", 1, 0.0), is_cold=False)
