"""Prometheus metrics of a server of forecasts."""

from time import perf_counter

from prometheus_client import Counter

from ...moe.config.model import LayersConfig
from ..engine.request_metrics import RequestMetrics
from ..experts.store import ExpertStore


class SeriesMetrics(RequestMetrics):
    """What such a server counts; ``render`` gives the exposition text."""

    def __init__(self, config: LayersConfig, store: ExpertStore | None) -> None:
        super().__init__(config, store)
        r = self.registry
        self.series = Counter("moeyard_forecast_series", "Series continued", registry=r)
        self.context = Counter("moeyard_forecast_context_points", "Points read", registry=r)
        self.ahead = Counter("moeyard_forecast_points", "Points forecast", registry=r)

    def count_forecast(self, context_points: int, horizon: int, num_series: int) -> None:
        """Count series that were computed together."""
        self.series.inc(num_series)
        self.context.inc(context_points)
        self.ahead.inc(horizon * num_series)

    def count_end(self, arrived: float) -> None:
        """Count a request that is answered, and the time since it ``arrived``."""
        self.finished.labels("length").inc()
        self.request_time.observe(perf_counter() - arrived)
