"""Read a run folder for the report, keeping only what the page shows.

L MoE layers, E experts.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError
from ..run.starts import STARTS

FRAME_BYTES = 600_000
"""Budget of the heat map: one byte for each layer, expert and moment that is kept."""
MAX_FRAMES = 120
NESTED = ("schedule", "copies")
"""Parts of a record whose numbers the page shows as curves."""

Point = tuple[float, float]


@dataclass(slots=True)
class Run:
    """What the report needs of a run."""

    name: str
    config: dict[str, Any]
    config_text: str
    starts: list[dict[str, Any]]
    last_checkpoint: str | None
    series: dict[str, list[Point]] = field(default_factory=dict)
    """(step, value) of every finite number at the top level of a record, and below ``schedule``
    and ``copies``: ``schedule/phases/forward/measured_s``."""
    phases: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    imbalance: list[tuple[int, list[float]]] = field(default_factory=list)
    """Step, and max/mean of each MoE layer."""
    frames: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    """Step, and routed rows [L][E] of that step; thinned."""
    last: dict[str, Any] = field(default_factory=dict)
    num_records: int = 0
    damage: str | None = None
    """A sentence about lines that could not be read."""

    @property
    def layers(self) -> list[int]:
        """Index of each MoE layer."""
        found: list[int] = self.last.get("moe_layers", list(range(len(self.last.get("load", [])))))
        return found


def read_run(folder: Path) -> Run:
    """Read a run folder; raise :class:`ConfigError` if it is not one or has no metrics yet."""
    config_path, metrics_path = folder / "config.yaml", folder / "metrics.jsonl"
    if not config_path.is_file():
        raise ConfigError(
            f"{folder} is not a run folder (it has no config.yaml); give the run_dir of a run."
        )
    if not metrics_path.is_file() or metrics_path.stat().st_size == 0:
        raise ConfigError(
            f"{folder} has no metrics yet; wait for the first logged step (train.log_every)."
        )
    try:
        text = config_path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{config_path} is not YAML; restore it from a backup.") from None
    latest = folder / "latest"
    run = Run(
        name=folder.resolve().name,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        starts=_json_lines(folder / STARTS),
        last_checkpoint=latest.read_text(encoding="utf-8").strip() if latest.is_file() else None,
    )
    _read_records(run, metrics_path)
    if not run.num_records:
        raise ConfigError(
            f"{metrics_path} has no line that can be read; start the run again to continue it."
        )
    return run


def _read_records(run: Run, path: Path) -> None:
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                step = int(record["step"])
            except (ValueError, TypeError, KeyError):
                what = "is half-written" if number == num_lines else "cannot be read"
                run.damage = (
                    f"Line {number} of {num_lines} in metrics.jsonl {what}; the page ends there."
                )
                return
            _add(run, step, record, number, num_lines)


def _add(run: Run, step: int, record: dict[str, Any], number: int, num_lines: int) -> None:
    run.num_records += 1
    run.last = record
    for key, value in _numbers(record):
        run.series.setdefault(key, []).append((step, value))
    if "phases_s" in record:
        run.phases.append((step, record["phases_s"]))
    if record.get("load"):
        run.imbalance.append((step, [layer["max_over_mean"] for layer in record["load"]]))
        counts_LE = record["expert_tokens"]
        stride = _stride(num_lines, sum(map(len, counts_LE)))
        if (number - 1) % stride == 0 or number == num_lines:
            run.frames.append((step, counts_LE))


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield prefix + key, value
        elif isinstance(value, dict) and (prefix or key in NESTED):
            yield from _numbers(value, f"{prefix}{key}/")


def _stride(num_lines: int, cells: int) -> int:
    """Return n such that every n-th record becomes a frame."""
    frames = max(2, min(MAX_FRAMES, FRAME_BYTES // cells))
    return -(-num_lines // frames)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return list(_readable(path)) if path.is_file() else []


def _readable(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            return  # a killed start may leave half a line
        if isinstance(value, dict):
            yield value
