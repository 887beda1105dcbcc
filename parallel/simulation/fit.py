"""Fit a cluster's description to steps that were measured.

Rates, latencies and contention are multiplied by factors. The factors are those with the smallest
sum of squares of relative errors over all runs, of the step and of its phases. A weak wish to stay
near the description decides what the runs do not tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from .choices import Choices
from .cluster import Cluster
from .curve import scaled
from .step import Prediction, simulate
from .workload import Workload

STAY = 0.05
"""A factor of e costs as much as an error of 5 % in one run."""
PHASE_WEIGHT = 0.5
"""Of the errors of phases, which are shares of the step."""
ENOUGH = 1e-4
"""Steps that change no more than this end the search."""
WIDEST = 5.0
"""No factor is above e to this power, or below one over that."""
OWN = {
    "achieved_experts": "achieved",
    "achieved_attention": "achieved",
    "memory_achieved_update": "memory_achieved",
}
"""Shares that are others where the description leaves them out."""
SHARES = ("achieved", "memory_achieved", *OWN)
LINK_SHARES = ("achieved", "achieved_all_to_all")
LATENCIES = ("layer_latency", "step_latency")


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A run whose steps were timed."""

    name: str
    work: Workload
    num_gpus: int
    step_s: float
    phases_s: Mapping[str, float] = field(default_factory=dict)
    """Some of the phases of :attr:`Prediction.phases_s`, or none."""
    choices_L: Sequence[Choices] = ()
    """How tokens chose; empty = evenly."""
    bandwidths: Mapping[str, float] = field(default_factory=dict)
    """Bytes a second of ``inside_node`` and ``between_nodes``, where they are not the cluster's."""

    def predict(self, cluster: Cluster) -> Prediction:
        """Return what is predicted for the run."""
        links = {
            name: getattr(cluster, name).model_copy(update={"bandwidth": bandwidth})
            for name, bandwidth in self.bandwidths.items()
        }
        own = cluster.model_copy(update=links)
        return simulate(self.work, own, self.num_gpus, self.choices_L)


def fitted(cluster: Cluster, runs: Sequence[Measured]) -> Cluster:
    """Return the description that explains ``runs`` best."""
    start = _with_own_shares(cluster)
    names = _names(start, runs)

    def errors(logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        tried = with_factors(start, dict(zip(names, np.exp(logs).tolist(), strict=True)))
        found = [value for run in runs for value in _errors(tried, run)]
        return np.array([*found, *(STAY * logs)])

    start_at, near = np.zeros(len(names)), {"ftol": ENOUGH, "xtol": ENOUGH}
    best = least_squares(errors, start_at, bounds=(-WIDEST, WIDEST), **near)
    return with_factors(start, dict(zip(names, np.exp(best.x).tolist(), strict=True)))


def _errors(cluster: Cluster, run: Measured) -> list[float]:
    predicted = run.predict(cluster)
    found = [float(np.log(predicted.step_s / run.step_s))]
    for phase, seconds in run.phases_s.items():
        error_s = predicted.phases_s[phase] - seconds
        found.append(PHASE_WEIGHT * error_s / run.step_s)
    return found


def _with_own_shares(cluster: Cluster) -> Cluster:
    """Give every kind of work a share of its own, which may then differ."""
    gpu = cluster.gpu
    updates: dict[str, Any] = {
        "gpu": gpu.model_copy(
            update={name: getattr(gpu, name) or getattr(gpu, other) for name, other in OWN.items()}
        )
    }
    for section in ("inside_node", "between_nodes"):
        link = getattr(cluster, section)
        if link is not None:
            share = link.achieved_all_to_all or link.achieved
            updates[section] = link.model_copy(update={"achieved_all_to_all": share})
    return cluster.model_copy(update=updates)


def _names(cluster: Cluster, runs: Sequence[Measured]) -> list[str]:
    """Return what can be fitted: what is not 0, and matters to a run."""
    names = [f"gpu.{name}" for name in (*SHARES, *LATENCIES) if getattr(cluster.gpu, name)]
    most = max(run.num_gpus for run in runs)
    has_links = {
        "inside_node": most > 1 and cluster.gpus_per_node > 1,
        "between_nodes": most > cluster.gpus_per_node,
    }
    for section in (section for section, is_used in has_links.items() if is_used):
        names += [f"{section}.{name}" for name in (*LINK_SHARES, "latency")]
        if getattr(cluster, section).host is not None:
            names.append(f"{section}.host")
    return [*names, "contention"] if cluster.contention and most > 1 else names


def with_factors(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """Return a cluster some of whose numbers are multiplied; shares stay at most 1."""
    updates: dict[str, Any] = {}
    for section in ("gpu", "inside_node", "between_nodes"):
        part = getattr(cluster, section)
        changed: dict[str, Any] = {}
        for name, factor in factors.items():
            own, _, key = name.rpartition(".")
            if own != section:
                continue
            value = getattr(part, key)
            is_share = key in SHARES or key in LINK_SHARES
            changed[key] = scaled(value, factor) if is_share else value * factor
            if key == "latency":
                changed["message"] = part.message * factor
        if changed:
            updates[section] = part.model_copy(update=changed)
    if "contention" in factors:
        updates["contention"] = min(1.0, cluster.contention * factors["contention"])
    return cluster.model_copy(update=updates)
