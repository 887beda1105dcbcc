"""One set of metrics for all replicas: the counts of one process, whichever replicas live."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moeyard.serving.engine import expert_metrics
from moeyard.serving.engine.metrics import EngineMetrics
from moeyard.serving.replicas.metrics_hub import (
    FOLDED_AFTER_S,
    LIVES_FOR_S,
    MetricsHub,
    snapshot_of,
)

from small_model import CONFIG


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Counted:
    """A registry with one metric of each kind."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.asked = Counter("asked", "Requests", ["reason"], registry=self.registry)
        self.took = Histogram("took_seconds", "Time", buckets=(0.1, 1, 5), registry=self.registry)
        self.running = Gauge("running", "Now", registry=self.registry)

    def observe(self, reason, seconds):
        self.asked.labels(reason).inc()
        self.took.observe(seconds)

    def snapshot(self):
        return snapshot_of(self.registry)


def samples(text):
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["observe", "push", "end", "silence"]),
        st.sampled_from(["stop", "length"]),
        st.sampled_from([0.05, 0.5, 2.0, 9.0]),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(EVENTS)
def test_counts_are_those_of_one_process_and_never_go_back(events):
    """Replicas push after every observation here, so none is lost."""
    clock, whole = Clock(), Counted()
    hub = MetricsHub(clock)
    lives = {slot: (f"{slot}.0", Counted()) for slot in range(4)}
    before = {}
    for slot, action, reason, seconds in events:
        name, counted = lives[slot]
        if action == "observe":
            counted.observe(reason, seconds)
            whole.observe(reason, seconds)
        if action in ("observe", "push", "end"):
            hub.push(name, f"replica{slot}", counted.snapshot())
        if action == "end":
            hub.end(name)
        if action == "silence":
            clock.now += FOLDED_AFTER_S + 1
        # What ended, and everybody after so long a silence, comes back as another one.
        for reborn in lives if action == "silence" else [slot] if action == "end" else []:
            number = int(lives[reborn][0].partition(".")[2])
            lives[reborn] = (f"{reborn}.{number + 1}", Counted())
        found = samples(hub.render())
        for series, value in before.items():
            assert found[series] >= value
        before = {series: value for series, value in found.items() if series != ("running",)}
    expected = samples(generate_latest(whole.registry))
    del expected[("running",)]
    for series, value in expected.items():
        assert before.get(series, 0) == pytest.approx(value)


def test_gauges_are_those_of_the_living():
    clock = Clock()
    hub = MetricsHub(clock)
    first, second = Counted(), Counted()
    first.running.set(3)
    second.running.set(4)
    hub.push("a", "r1", first.snapshot())
    clock.now += LIVES_FOR_S / 2
    hub.push("b", "r2", second.snapshot())
    assert samples(hub.render())[("running",)] == 7
    clock.now += LIVES_FOR_S / 2 + 1
    assert samples(hub.render())[("running",)] == 4
    hub.end("b")
    assert ("running",) not in samples(hub.render())


def test_what_comes_after_the_end_is_not_counted_twice():
    hub, counted = MetricsHub(), Counted()
    counted.observe("stop", 1)
    hub.push("a", "r1", counted.snapshot())
    hub.end("a")
    hub.push("a", "r1", counted.snapshot())
    hub.end("a")
    assert samples(hub.render())[("asked_total", ("reason", "stop"))] == 1


def engine_metrics(rows_LE):
    """An engine's metrics after it routed so many rows to each expert."""
    metrics = EngineMetrics(CONFIG, None)
    metrics.count_routing(
        SimpleNamespace(counts_E=rows_E, num_tokens=rows_E.sum() // 2) for rows_E in rows_LE
    )
    return metrics


ROWS = [
    torch.tensor([[8, 2, 0, 0, 0, 0], [5, 5, 0, 0, 0, 0]]),
    torch.tensor([[0, 2, 6, 2, 6, 4], [0, 0, 5, 5, 5, 5]]),
]


def test_load_follows_from_the_rows_of_all_replicas():
    hub = MetricsHub()
    for number, rows_LE in enumerate(ROWS):
        hub.push(str(number), f"r{number}", snapshot_of(engine_metrics(rows_LE).registry))
    found = samples(hub.render())
    whole = samples(engine_metrics(ROWS[0] + ROWS[1]).render())
    names = ("moeyard_expert_load_max_over_mean", "moeyard_experts_idle", "moeyard_expert_tokens")
    compared = [series for series in whole if series[0].startswith(names)]
    assert len(compared) == 2 + 2 + 12
    assert {series: found[series] for series in compared} == {s: whole[s] for s in compared}
    assert found[("moeyard_moe_top_k",)] == 2 == whole[("moeyard_moe_top_k",)]
    assert found[("moeyard_moe_tokens_total",)] == whole[("moeyard_moe_tokens_total",)]
    assert found[("process_start_time_seconds",)] == pytest.approx(
        whole[("process_start_time_seconds",)]
    )


def test_a_ratio_that_cannot_be_added_keeps_its_replica(monkeypatch):
    monkeypatch.setattr(expert_metrics, "MAX_EXPERT_SERIES", 1)  # no rows per expert are exported
    hub, expected = MetricsHub(), {}
    for number, rows_LE in enumerate(ROWS):
        metrics = engine_metrics(rows_LE)
        hub.push(str(number), f"r{number}", snapshot_of(metrics.registry))
        for series, value in samples(metrics.render()).items():
            if series[0] == "moeyard_expert_load_max_over_mean":
                expected[(*series, ("replica", f"r{number}"))] = value
    found = samples(hub.render())
    name = "moeyard_expert_load_max_over_mean"
    assert {s: v for s, v in found.items() if s[0] == name} == expected and len(expected) == 4


def test_is_drained_when_every_living_replica_has_said_so():
    clock = Clock()
    hub = MetricsHub(clock)
    hub.push("a", "r1", (), 0, True)
    hub.push("b", "r2", (), 0, False)
    assert not hub.is_drained()
    hub.push("b", "r2", (), 1, True)
    assert not hub.is_drained()
    hub.push("b", "r2", (), 0, True)
    assert hub.is_drained()
    hub.push("c", "r3", (), 5, False)
    assert not hub.is_drained()
    clock.now += LIVES_FOR_S + 1
    assert hub.is_drained(), "a replica that died can never answer"
