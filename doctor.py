"""``moeyard doctor``: what this machine has, and whether the expert backends compute correctly.

Optional packages are looked up and never imported: some take seconds to import, or end the process
if their libraries are missing.
"""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .kernels.experts import BackendCheck, check_backends

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")
"""The vector units that decide how fast BLAS is. ``sve`` and ``bf16`` are Arm's."""

PACKAGES = {
    "ray": "serving needs it: pip install 'moeyard[serve]'",
    "triton": "comes with PyTorch's CUDA build",
    "deepspeed": "optional: pip install deepspeed",
    "megablocks": "optional: docs/backends.md says how to build it",
    "datasets": "optional: pip install 'moeyard[datasets]'",
    "tensorboard": "optional: pip install 'moeyard[tensorboard]'",
    "wandb": "optional: pip install 'moeyard[wandb]'",
}
"""What to print for a missing package."""


def examine() -> tuple[dict[str, Any], list[BackendCheck]]:
    """Return the facts of the machine by section, and the checks of the backends."""
    facts = {"machine": _machine(), "torch": _torch(), "packages": _packages()}
    return facts, list(check_backends())


def as_json(facts: dict[str, Any], checks: list[BackendCheck]) -> dict[str, Any]:
    """Return everything as plain values; ``passed`` is False if any backend fails."""
    listed = [asdict(check) | {"passed": check.passed} for check in checks]
    return {**facts, "backends": listed, "passed": not any(check.failed for check in checks)}


def as_text(facts: dict[str, Any], checks: list[BackendCheck]) -> str:
    """Return everything as aligned tables."""
    lines = []
    for section, values in facts.items():
        width = max(map(len, values))
        lines += [section, *(f"  {name:{width}}  {value}" for name, value in values.items()), ""]
    lines += ["expert backends, largest relative error against the reference in fp64"]
    parts = next((list(check.errors) for check in checks if check.errors), [])
    rows = [["backend", "device", "type", *parts, "limit", ""]]
    for check in checks:
        cells = [f"{check.errors[p]:.0e}" if p in check.errors else "-" for p in parts]
        verdict = "passed" if check.passed else f"FAILED {check.problem or ''}".rstrip()
        limit = f"{check.limit:.0e}"
        if check.unavailable is not None:
            limit, verdict = "-", f"not available: {check.unavailable}"
        rows.append([check.backend, check.device, check.dtype, *cells, limit, verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {line}".rstrip())
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, str]:
    model, flags = _cpuinfo()
    found = [flag for flag in ISA_FLAGS if flag in flags]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "vector units": " ".join(found) or "none of " + ", ".join(ISA_FLAGS),
        "cores usable": _cores(),
        "memory": _memory(),
    }


def _cpuinfo() -> tuple[str, set[str]]:
    """Return the CPU's name and flags; on systems without /proc its name alone."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown", set()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or "unknown", set(flags.split())


def _cores() -> str:
    has_affinity = hasattr(os, "sched_getaffinity")
    usable = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    text = f"{usable} of {os.cpu_count()}"
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        text += f", limited to {int(quota) / int(period):.3g} by a control group"
    return text


def _memory() -> str:
    fields = {}
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            fields[key] = int(value.split()[0]) * 1024
    if "MemTotal" not in fields:
        return "unknown"
    text = f"{_gib(fields['MemAvailable'])} free of {_gib(fields['MemTotal'])}"
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return f"{text}, limited to {_gib(int(limit))} by a control group" if limit.isdigit() else text


def _torch() -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from .kernels.trust import cpp, router_state

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "moeyard": f"{__version__}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "cpu code": torch.backends.cpu.get_cpu_capability(),
        "c++ kernels": cpp().state,
        "triton router": router_state(),
        "threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS changes it)",
        "gpus": ", ".join(f"{g.name} {_gib(g.total_memory)}" for g in gpus) or "none",
        "gloo": "available" if dist.is_gloo_available() else "not in this build of torch",
        "nccl": "available" if dist.is_nccl_available() else "not in this build of torch",
    }


def _packages() -> dict[str, str]:
    """Return each package's version, or how to install it."""
    found = {}
    for name, remedy in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"not installed ({remedy})"
            continue
        if importlib.util.find_spec(name) is None:
            found[name] += ", but its module is missing; install it again"
    return found


def _read(path: str) -> str:
    """Return a file's text, or "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
