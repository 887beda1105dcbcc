"""Prometheus metrics of the experts of one engine: their load, and their way into memory.

L MoE layers, E experts.
"""

import threading
from collections.abc import Iterator

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ...moe.config.model import LayersConfig
from ...moe.routers.load import MAX_EXPERT_SERIES, load_statistics
from ...moe.routers.routing import Routing
from ..experts.store import ExpertStore

TRAFFIC = {
    "hits": ("cache_hits", "Experts in memory when they were needed"),
    "misses": ("cache_misses", "Experts whose read began when they were needed"),
    "filled": ("filled", "Experts whose slot lacked channels that a row needed"),
    "copied": ("copied", "Experts that were missing and computed from a low-bit copy"),
    "copied_rows": ("copied_rows", "Rows of these experts"),
    "prefetch_issued": ("prefetch_issued", "Reads begun ahead of need"),
    "prefetch_useful": ("prefetch_useful", "Prefetched and in memory when needed"),
    "prefetch_late": ("prefetch_late", "Prefetched, still on their way when needed"),
    "prefetch_wasted": ("prefetch_wasted", "Prefetched and put out before they were needed"),
    "bytes_read": ("bytes_read", "Bytes of experts read, ahead and on demand"),
    "channel_bytes": ("channel_bytes_read", "Bytes of channels that a row needed, read on demand"),
    "prefetch_bytes": ("prefetch_bytes", "Bytes of experts read ahead"),
    "stall_s": ("stall_seconds", "Seconds compute waited"),
}
"""Field of :class:`LayerTraffic`: metric and help."""
HINTS = {
    "hinted": ("", "Experts that a predictor named so many MoE layers ahead"),
    "right": ("_right", "Those of them that were needed"),
    "needed": ("_needed", "Experts that layers with such hints needed"),
}
"""Field of :class:`HintTraffic`: end of the metric's name and help."""


class ExpertCollector(Collector):
    """Expert load and the store's traffic, computed when metrics are collected."""

    def __init__(self, config: LayersConfig, store: ExpertStore | None) -> None:
        self._store = store
        self._layers = [layer for layer in range(config.num_layers) if config.is_moe(layer)]
        num_experts = config.moe.num_experts if config.moe is not None else 0
        self._k = config.moe.router.k if config.moe is not None else 0
        self._counts_LE = torch.zeros(len(self._layers), num_experts, dtype=torch.int64)
        self._tokens = 0
        self._tokens_without_wait = 0
        self._num_waits = 0
        self._lock = threading.Lock()
        """Counts change in the engine's thread and are read in another."""

    def add(self, routings: list[Routing]) -> None:
        """Add one forward's routed rows."""
        if routings:
            counts_LE = torch.stack([routing.counts_E for routing in routings])
            with self._lock:
                num_tokens = int(routings[0].num_tokens)
                self._counts_LE += counts_LE
                self._tokens += num_tokens
                if self._store is not None:
                    num_waits = self._store.statistics.num_waits()
                    if num_waits == self._num_waits:
                        self._tokens_without_wait += num_tokens
                    self._num_waits = num_waits

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield all families."""
        yield from self._load()
        if self._store is not None:
            yield from self._traffic(self._store)
            yield from self._hints(self._store)
            yield CounterMetricFamily(
                "moeyard_tokens_without_miss",
                "Tokens of forwards that waited for no expert",
                value=self._tokens_without_wait,
            )
            yield CounterMetricFamily(
                "moeyard_tokens_with_copies",
                "Tokens that were computed with a low-bit copy of some expert",
                value=self._store.statistics.copied_tokens,
            )

    def _load(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        if not self._layers:
            return
        with self._lock:
            counts_LE, tokens = self._counts_LE.clone(), self._tokens
        yield CounterMetricFamily(
            "moeyard_moe_tokens",
            "Tokens that went through the MoE layers, prompt and generated",
            value=tokens,
        )
        yield GaugeMetricFamily("moeyard_moe_top_k", "Experts per token", value=self._k)
        per_expert = CounterMetricFamily(
            "moeyard_expert_tokens", "Rows routed to an expert", labels=["layer", "expert"]
        )
        imbalance = GaugeMetricFamily(
            "moeyard_expert_load_max_over_mean", "Largest over mean load", labels=["layer"]
        )
        idle = GaugeMetricFamily(
            "moeyard_experts_idle", "Experts that never got a row", labels=["layer"]
        )
        for layer, counts_E in zip(self._layers, counts_LE, strict=True):
            statistics = load_statistics(counts_E)
            imbalance.add_metric([str(layer)], statistics.max_over_mean)
            idle.add_metric([str(layer)], statistics.idle)
            if counts_LE.numel() <= MAX_EXPERT_SERIES:
                for expert, count in enumerate(counts_E.tolist()):
                    per_expert.add_metric([str(layer), str(expert)], count)
        yield from (per_expert, imbalance, idle)

    @staticmethod
    def _hints(store: ExpertStore) -> Iterator[CounterMetricFamily]:
        families = {
            name: CounterMetricFamily(f"moeyard_expert_hints{suffix}", text, labels=["distance"])
            for name, (suffix, text) in HINTS.items()
        }
        for distance, traffic in sorted(store.statistics.hint_traffic.copy().items()):
            for name, family in families.items():
                family.add_metric([str(distance)], getattr(traffic, name))
        yield from families.values()

    @staticmethod
    def _traffic(store: ExpertStore) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        families = {
            name: CounterMetricFamily(f"moeyard_expert_{metric}", text, labels=["layer"])
            for name, (metric, text) in TRAFFIC.items()
        }
        for layer, traffic in store.statistics.layers.items():
            for name, family in families.items():
                family.add_metric([str(layer)], getattr(traffic, name))
        yield from families.values()
        by_tier = CounterMetricFamily(
            "moeyard_expert_tier_reads", "Experts read, by where they came from", labels=["tier"]
        )
        bytes_by_tier = CounterMetricFamily(
            "moeyard_expert_tier_bytes", "Bytes of these experts", labels=["tier"]
        )
        for source, count in store.rates.reads.items():
            by_tier.add_metric([source], count)
            bytes_by_tier.add_metric([source], store.rates.bytes[source])
        yield from (by_tier, bytes_by_tier)
        yield CounterMetricFamily(
            "moeyard_expert_evictions", "Experts put out", value=store.statistics.evictions
        )
        yield GaugeMetricFamily(
            "moeyard_expert_slots", "Experts that fit the budget", value=store.num_slots
        )
        yield GaugeMetricFamily(
            "moeyard_expert_slot_bytes",
            "Bytes of one expert, the largest where widths differ",
            value=store.slot_bytes,
        )
        yield GaugeMetricFamily(
            "moeyard_experts_resident", "Experts in memory", value=store.counts().resident
        )
