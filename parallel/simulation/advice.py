"""What would make a run fit or go faster: the same step with other settings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ...errors import ConfigError
from ..planning.placement import Placement
from .choices import Choices
from .memory import Memory
from .placed import better_owners
from .step import Prediction
from .workload import Workload


class Again(Protocol):
    """The same simulation with another workload, or with other owners of experts."""

    def __call__(self, work: Workload, owners_L: Sequence[Placement] | None = None) -> Prediction:
        """Return the prediction; raise :class:`ConfigError` where the workload cannot run."""
        ...


GAIN = 1.02
"""A setting that saves less than 2 % is not worth a line."""
OWNERS = "owners of experts that suit the load (moeyard trace place --kind hecate)"
COPY_BYTES = 1 << 30
"""The default of parallel.copies.max_bytes."""


def what_fits(found: Prediction, again: Again) -> str:
    """Return one sentence: what memory a rank needs, and what would help."""
    room = found.cluster.gpu.memory
    text = (
        f"{found.fold.world.size} GPUs: a rank needs {gigabytes(found.memory.total)} of "
        f"{gigabytes(room)} ({_largest(found.memory)})"
    )
    needed = [(name, other.memory.total) for name, other in _tried(_smaller(found.work), again)]
    fitting = [f"{name} ({gigabytes(size)})" for name, size in needed if size <= room]
    if fitting:
        return f"{text}; these would fit: {', '.join(fitting)}."
    less = sorted((size, name) for name, size in needed if size < found.memory.total)
    helping = [f"{name} ({gigabytes(size)})" for size, name in less[:3]]
    if helping:
        return f"{text}; no single change makes it fit, and these help most: {', '.join(helping)}."
    return f"{text}; use GPUs with more memory, more GPUs or a smaller model."


def what_is_faster(
    found: Prediction, again: Again, choices_L: Sequence[Choices]
) -> Iterator[tuple[str, str]]:
    """Yield settings with which the step would be clearly shorter, and how long it would be."""
    tried = list(_tried(_faster(found.work), again))
    if choices_L and found.work.ep > 1:
        owners_L = better_owners(found.work, found.fold, choices_L)
        tried.append((OWNERS, again(found.work, owners_L)))
    for name, other in tried:
        if other.step_s * GAIN <= found.step_s and other.fits >= found.fits:
            before_ms, after_ms = 1000 * found.step_s, 1000 * other.step_s
            size = found.fold.world.size
            yield name, f"{after_ms:.4g} ms instead of {before_ms:.4g} on {size} GPUs"


def gigabytes(num_bytes: float) -> str:
    """Return a size in GB, as data sheets count them."""
    return f"{num_bytes / 1e9:.3g} GB"


def _largest(memory: Memory) -> str:
    kinds = ("weights", "masters", "gradients", "moments", "activations", "buffers", "copies")
    sizes = sorted(((getattr(memory, kind), kind) for kind in kinds), reverse=True)
    return ", ".join(f"{kind} {gigabytes(size)}" for size, kind in sizes[:3])


def _tried(
    changes: Iterator[tuple[str, Workload]], again: Again
) -> Iterator[tuple[str, Prediction]]:
    for name, work in changes:
        try:
            yield name, again(work)
        except ConfigError:
            continue  # another setting forbids it


def _smaller(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield changes that need less memory."""
    if work.dense == "ddp":
        sliceless = replace(work, dense="fsdp", has_gradient_slices=False)
        yield "parallel.dense=fsdp", sliceless
    if work.recompute is False:
        yield "train.recompute=experts", replace(work, recompute="experts")
    if work.recompute is not True:
        yield "train.recompute=true", replace(work, recompute=True)
    for factor in (2, 4):
        times = work.accumulation * factor
        yield f"train.accumulation={times}", replace(work, accumulation=times)
    if work.model.moe is not None and work.copy_bytes is None and not work.shards_experts:
        yield "optimizer.shard_experts=true", replace(work, shards_experts=True)
    if work.model.moe is not None:
        for factor in (2, 4, 8):
            yield f"parallel.ep={work.ep * factor}", replace(work, ep=work.ep * factor)
    if work.dense == "ddp" and work.recompute is not True:
        both = replace(work, dense="fsdp", has_gradient_slices=False, recompute=True)
        yield "parallel.dense=fsdp with train.recompute=true", both


def _faster(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield changes that may be faster and leave the results as they are."""
    if work.ep > 1 and work.expert_tp == 1 and work.path in ("all_to_all", "hierarchical"):
        auto = replace(work, path="auto", chunks="auto", backward_chunks=None)
        yield "parallel.path=auto parallel.chunks=auto", auto
    if work.ep > 1 and work.expert_tp == 1 and work.path != "padded" and not _forbids_copies(work):
        yield "parallel.copies={}", replace(work, copy_bytes=COPY_BYTES)
    for factor in (2, 4):
        if work.ep % factor == 0:
            yield f"parallel.ep={work.ep // factor}", replace(work, ep=work.ep // factor)
    if work.recompute is not False:
        yield "train.recompute=false", replace(work, recompute=False)
    if work.recompute is True:
        yield "train.recompute=experts", replace(work, recompute="experts")
    if work.dense == "fsdp":
        yield "parallel.dense=ddp", replace(work, dense="ddp")


def _forbids_copies(work: Workload) -> bool:
    """Whether copies are there already, or cannot be (training/optimizers/check.py)."""
    return work.copy_bytes is not None or work.shards_experts
