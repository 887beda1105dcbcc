"""Check that a model fits into free memory, before anything is allocated."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from ..moe.folders.tensor_names import dense_tensors
from .experts.budget import bytes_of_experts

GROUPS = Path("/sys/fs/cgroup")


def check_memory(
    files: ModelFolder,
    dtype: torch.dtype,
    expert_memory: str | None,
    num_replicas: int = 1,
    host_bytes: int = 0,
    copies_bytes: int = 0,
    kv_bytes: int = 0,
) -> None:
    """Raise :class:`ConfigError` for a model that needs more memory than this process can get.

    ``num_replicas`` share the machine, each with ``copies_bytes`` of low-bit copies and
    ``kv_bytes`` for keys and values, and ``host_bytes`` of it hold further experts. Without this
    check, the system would kill some process, or this one would fail half-way.
    """
    experts = bytes_of_experts(files, dtype, expert_memory) + copies_bytes
    others = sum(tensor.numel() for _, tensor in dense_tensors(files.config)) * dtype.itemsize
    free = available_bytes()
    needed = num_replicas * (experts + others + kv_bytes) + host_bytes
    if needed > free:
        each = f" for each of {num_replicas} replicas" if num_replicas > 1 else ""
        host = f", and {_gib(host_bytes)} of host memory" if host_bytes else ""
        kv = f" and {_gib(kv_bytes)} for keys and values" if kv_bytes else ""
        remedy = "expert-memory or kv-memory" if kv_bytes else "expert-memory"
        raise ConfigError(
            f"{files.path} needs {_gib(experts + others + kv_bytes)} of memory{each}, "
            f"{_gib(experts)} of it for experts{kv}{host}, but only {_gib(free)} is free; set a "
            f"smaller {remedy}, or use a machine with more."
        )


def available_bytes() -> int:
    """Return what this process can still get: of the machine, its control groups, its limit."""
    free = [*_of_machine(), *_of_groups(), *_of_process()]
    return max(0, min(free, default=1 << 62))


def _of_machine() -> Iterator[int]:
    fields = _numbers(Path("/proc/meminfo"))
    if "MemAvailable:" in fields:  # kB
        yield (fields["MemAvailable:"] + fields.get("SwapFree:", 0)) << 10


def _of_groups() -> Iterator[int]:
    """Yield what each control group around this process leaves; page cache can be given back."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, prefix = GROUPS, ""
            files = ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, prefix = GROUPS / "memory", "total_"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (_number(folder / file) for file in files)
            if limit is not None and used is not None:
                parts = _numbers(folder / "memory.stat")
                names = (f"{prefix}inactive_file", f"{prefix}active_file")
                yield limit - used + sum(parts.get(name, 0) for name in names)
            if folder == root:
                break


def _of_process() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _number(Path("/proc/self/statm"))
    if limit != resource.RLIM_INFINITY and used is not None:
        yield limit - used * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    """Return the first word of a file, if it is a number."""
    try:
        return int(path.read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return None  # no such group, or "max"


def _numbers(path: Path) -> dict[str, int]:
    """Return a file of names and numbers, one pair a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.3g} GiB"
