"""A Prometheus port for a training run.

L MoE layers, E experts.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from torch import Tensor

from ...errors import ConfigError
from ...moe.routers.load import MAX_EXPERT_SERIES, load_statistics
from ..config import RunConfig
from ..step import StepResult
from .observers import Observer

CLOSE_S = 5
"""Most seconds to wait for a scrape under way."""
LAST_VALUES = {
    "step": "Optimizer steps done",
    "loss": "Of the last batch: {unit}",
    "learning_rate": "Of the last step",
    "grad_norm": "Global gradient norm before clipping",
    "eval_loss": "Of held-out data: {unit}",
    "tokens_per_second": "{rows} per second of the last logged step",
    "expert_copies": "Copies of experts on all ranks and in all layers, last logged step",
    "experts_moved": "Experts with another owner than the first one, all layers",
}
"""Gauges and their help: ``unit`` is that of the loss, ``rows`` are those of the model. A run has
the measures of its ``data`` section in addition."""
LABELLED_VALUES = {
    "held_out": ("measure", "Measures of held-out data with names of their own, such as a task's"),
    "layer_chunks": ("phase", "Messages into which a layer's rows are cut"),
    "layer_seconds_predicted": ("phase", "Seconds of a layer by the cost model"),
    "layer_seconds_measured": ("phase", "Seconds of a layer since the last logged step"),
    "cost_model_r2": ("operation", "Fit of the cost model; 1 is exact"),
    "rank_load_max_over_mean": ("copies", "Rows of the fullest rank over the mean, last step"),
}
"""Gauges with a label: its name, and their help."""

disable_created_metrics()  # a second series per counter that nothing here reads


class PrometheusPort(Observer):
    """Serves ``moeyard_train_*`` at ``monitor.prometheus_host:prometheus_port``.

    Counters begin at 0 with each start of the program, as ``rate()`` expects. They rise with every
    step, logged or not.
    """

    def __init__(self, config: RunConfig) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        target = Gauge("moeyard_train_steps_target", "Steps the run will take", registry=r)
        target.set(config.train.steps)
        rows = config.model.row_names.capitalize()
        self._tokens = Counter("moeyard_train_tokens", f"{rows} trained on", registry=r)
        self._last = LastValues(_helps(config))
        r.register(self._last)
        self._progress = ProgressCollector(config.routed_layers)
        r.register(self._progress)
        host, port = config.monitor.prometheus_host, config.monitor.prometheus_port
        assert port is not None, "no port was asked for"
        try:
            self._server, self._thread = start_http_server(port, host, r)
        except OSError as error:
            raise ConfigError(
                f"monitor.prometheus_port is {port}, which cannot be listened on at {host} "
                f"({error.strerror}); choose another port or monitor.prometheus_host."
            ) from None

    def step(self, done: int, result: StepResult, phase_seconds: Mapping[str, float]) -> None:
        """Count a step."""
        self._last.set("step", done)
        self._last.set("loss", result.loss)
        self._last.set("learning_rate", result.lr)
        self._last.set("grad_norm", result.grad_norm)
        self._tokens.inc(result.num_tokens)
        self._progress.add(result, phase_seconds)

    def record(self, record: dict[str, Any]) -> None:
        """Set the gauges that only records have."""
        self._last.set("tokens_per_second", record["tokens_per_s"])
        for name in record:
            if name.startswith("eval_") and name in self._last.helps:
                self._last.set(name, record[name])
            elif name.startswith("eval_"):
                self._last.set_labelled("held_out", name.removeprefix("eval_"), record[name])
        if "schedule" in record:
            self._schedule(record["schedule"])
        if "copies" in record:
            copies = record["copies"]
            self._last.set("expert_copies", copies["number"])
            self._last.set("experts_moved", copies["moved"])
            self._last.set_labelled("rank_load_max_over_mean", "without", copies["share_without"])
            self._last.set_labelled("rank_load_max_over_mean", "with", copies["share"])

    def _schedule(self, schedule: dict[str, Any]) -> None:
        last = self._last
        last.set_labelled("layer_chunks", "forward", schedule["chunks"])
        last.set_labelled("layer_chunks", "backward", schedule["backward_chunks"])
        for phase, compared in schedule["phases"].items():
            last.set_labelled("layer_seconds_predicted", phase, compared["predicted_s"])
            last.set_labelled("layer_seconds_measured", phase, compared["measured_s"])
        for operation, r2 in schedule["r2"].items():
            last.set_labelled("cost_model_r2", operation, r2)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=CLOSE_S)


def _helps(config: RunConfig) -> dict[str, str]:
    """Return the help of each gauge of a run that has no label."""
    words = {"unit": config.data.loss_unit, "rows": config.model.row_names.capitalize()}
    return {name: text.format(**words) for name, text in LAST_VALUES.items()} | dict(
        config.data.measures
    )


class LastValues(Collector):
    """Gauges that appear once they have a value; no loss of 0 shows before the first step.

    ``helps`` has the help of each gauge without labels.
    """

    def __init__(self, helps: Mapping[str, str]) -> None:
        self.helps = helps
        self._values: dict[str, float] = {}
        self._labelled: dict[str, dict[str, float]] = {}

    def set(self, name: str, value: float) -> None:
        """Show ``value`` as ``moeyard_train_NAME`` from now on."""
        assert name in self.helps, name
        self._values[name] = value

    def set_labelled(self, name: str, label: str, value: float) -> None:
        """Show ``value`` as ``moeyard_train_NAME{...="label"}`` from now on."""
        assert name in LABELLED_VALUES, name
        self._labelled[name] = {**self._labelled.get(name, {}), label: value}  # read by a thread

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what has a value."""
        for name, value in list(self._values.items()):
            yield GaugeMetricFamily(f"moeyard_train_{name}", self.helps[name], value=value)
        for name, values in list(self._labelled.items()):
            label, text = LABELLED_VALUES[name]
            family = GaugeMetricFamily(f"moeyard_train_{name}", text, labels=[label])
            for place, value in values.items():
                family.add_metric([place], value)
            yield family


class ProgressCollector(Collector):
    """Phases and expert load; statistics are computed on each scrape."""

    def __init__(self, layers: list[int]) -> None:
        self._layers = layers
        self._phase_seconds: Mapping[str, float] = {}
        self._last_LE = torch.zeros(0, dtype=torch.int64)
        self._total_LE = torch.zeros(0, dtype=torch.int64)
        self._dropped_L = [0] * len(layers)
        self._steps = 0
        self._lock = threading.Lock()
        """The training loop's thread adds; the HTTP server's thread reads."""

    def add(self, result: StepResult, phase_seconds: Mapping[str, float]) -> None:
        """Add one step."""
        counts_LE = result.counts_LE
        with self._lock:
            self._phase_seconds = phase_seconds
            self._total_LE = counts_LE + self._total_LE if self._steps else counts_LE
            self._last_LE = counts_LE
            both = zip(self._dropped_L, result.dropped_L, strict=True)
            self._dropped_L = [before + more for before, more in both]
            self._steps += 1

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield all families; those of the load only after the first step."""
        with self._lock:  # tensors are replaced, never written to
            phases, steps = self._phase_seconds, self._steps
            last_LE, total_LE, dropped_L = self._last_LE, self._total_LE, self._dropped_L
        seconds = CounterMetricFamily(
            "moeyard_train_phase_seconds", "Wall time of rank 0 by phase", labels=["phase"]
        )
        for phase, value in phases.items():
            seconds.add_metric([phase], value)
        yield seconds
        if steps and self._layers:
            yield from self._statistics(last_LE)
            yield from self._totals(total_LE, dropped_L)

    def _statistics(self, last_LE: Tensor) -> Iterator[GaugeMetricFamily]:
        families = {
            name: GaugeMetricFamily(f"moeyard_train_{metric}", text, labels=["layer"])
            for name, metric, text in (
                ("max_over_mean", "expert_load_max_over_mean", "Largest over mean, last step"),
                ("max_violation", "expert_load_max_violation", "MaxVio, last step"),
                ("cv", "expert_load_cv", "Standard deviation over mean, last step"),
                ("entropy", "expert_load_entropy_nats", "Entropy of the load, last step"),
                ("idle", "experts_idle", "Experts without a row in the last step"),
            )
        }
        for layer, counts_E in zip(self._layers, last_LE, strict=True):
            statistics = load_statistics(counts_E).as_dict()
            for name, family in families.items():
                family.add_metric([str(layer)], statistics[name])
        yield from families.values()

    def _totals(self, total_LE: Tensor, dropped_L: list[int]) -> Iterator[CounterMetricFamily]:
        dropped = CounterMetricFamily(
            "moeyard_train_rows_dropped", "Routed rows that no expert took", labels=["layer"]
        )
        routed = CounterMetricFamily(
            "moeyard_train_expert_tokens", "Rows routed to an expert", labels=["layer", "expert"]
        )
        for layer, total_E, rows in zip(self._layers, total_LE, dropped_L, strict=True):
            dropped.add_metric([str(layer)], rows)
            if total_LE.numel() <= MAX_EXPERT_SERIES:
                for expert, rows in enumerate(total_E.tolist()):
                    routed.add_metric([str(layer), str(expert)], rows)
        yield from (dropped, routed)
