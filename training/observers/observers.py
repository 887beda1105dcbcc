"""The interface of observers, and the fan-out of a run's events to all of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..step import StepResult

log = logging.getLogger(__name__)


class Observer:
    """Sees a run; most kinds on rank 0 alone. Subclasses override the methods they need."""

    def step(self, done: int, result: StepResult, phase_seconds: Mapping[str, float]) -> None:
        """See every step, logged or not; ``phase_seconds`` are totals since this start."""

    def record(self, record: dict[str, Any]) -> None:
        """See a record of ``metrics.jsonl``; it includes ``step``."""

    def close(self) -> None:
        """Close files, ports and connections."""


class Observers:
    """All observers of a run.

    The metrics log in the run folder is needed. Optional observers must not end a long run: if one
    fails, that is logged once and training continues without it.
    """

    def __init__(self, needed: Sequence[Observer] = (), optional: Sequence[Observer] = ()) -> None:
        self._needed = list(needed)
        self._optional = list(optional)

    def step(self, done: int, result: StepResult, phase_seconds: Mapping[str, float]) -> None:
        """Show every observer a step."""
        self._tell_all(lambda observer: observer.step(done, result, phase_seconds))

    def record(self, record: dict[str, Any]) -> None:
        """Show every observer a record."""
        self._tell_all(lambda observer: observer.record(record))

    def close(self) -> None:
        """Close them all."""
        self._tell_all(lambda observer: observer.close())

    def _tell_all(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._needed:
            tell(observer)
        for observer in list(self._optional):
            try:
                tell(observer)
            except Exception as error:
                self._optional.remove(observer)
                name = type(observer).__name__
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning("%s failed (%s); training goes on without it.", name, reason)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Flatten a record into the tags that TensorBoard and W&B show, grouped by their prefix."""
    tags = {
        "train/loss": record["loss"],
        "train/balance_loss": record["balance"],
        "train/z_loss": record["z"],
        "train/grad_norm": record["grad_norm"],
        "train/learning_rate": record["lr"],
        "train/tokens": record["tokens"],
        "speed/tokens_per_second": record["tokens_per_s"],
    }
    for side in ("train", "eval"):
        measured = {name: value for name, value in record.items() if name.startswith(f"{side}_")}
        tags |= {name.replace("_", "/", 1): value for name, value in measured.items()}
    for phase, seconds in record["phases_s"].items():
        tags[f"phase_seconds/{phase}"] = seconds
    if "schedule" in record:
        tags |= _of_schedule(record["schedule"])
    for name, value in record.get("copies", {}).items():
        tags[f"expert_copies/{name}"] = value
    for layer, load in zip(record["moe_layers"], record["load"], strict=True):
        for name, value in load.items():
            tags[f"expert_load_{name}/layer_{layer}"] = value
    return tags


def _of_schedule(schedule: dict[str, Any]) -> dict[str, float]:
    shown = ("chunks", "backward_chunks", "contention")
    tags = {f"schedule/{name}": schedule[name] for name in shown}
    tags |= {f"schedule_r2/{name}": r2 for name, r2 in schedule["r2"].items()}
    for phase, compared in schedule["phases"].items():
        tags[f"schedule_relative_error/{phase}"] = compared["relative_error"]
    return tags
