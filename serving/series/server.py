"""Put a model of series, its thread and its HTTP application together from arguments."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace

import torch
from starlette.types import ASGIApp

from ...moe.adapters.table import AdapterTable
from ...moe.models.forecaster import Forecaster
from ...moe.models.model import ModelOutput
from ..api.adapters import ServedModels
from ..api.frame import Frame
from ..api.models import ModelRoutes
from ..engine.admission import Admission
from ..experts.event_log import SUFFIX as LOG_SUFFIX
from ..loading import open_kind
from ..openers.series import SERIES_KINDS
from ..replica_files import replica_file
from ..serve_args import ServeArgs
from .args import refuse_text_arguments
from .endpoint import ForecastEndpoint
from .metrics import SeriesMetrics
from .thread import ForecastThread


class SeriesServer:
    """A running model of series, with what :class:`.Hosted` asks for."""

    def __init__(self, args: ServeArgs, replica: str = "server") -> None:
        refuse_text_arguments(args)
        share = max(1, len(os.sched_getaffinity(0)) // args.most_replicas)
        torch.set_num_threads(args.num_threads or share)
        options = args.store_options
        if args.expert_log is not None:
            path = replica_file(args.expert_log, replica, "expert-log", LOG_SUFFIX)
            options = replace(options, log=path)
        forecaster, self._store = open_kind(
            args.model,
            SERIES_KINDS,
            dtype=args.dtype,
            expert_memory=args.expert_memory,
            options=options,
            ignore_unused_weights=args.ignore_unused_weights,
            allow_code=args.allow_code,
        )
        self.metrics = SeriesMetrics(forecaster.config, self._store)
        _count_routings(forecaster, self.metrics)
        self.thread = ForecastThread(forecaster, self.metrics, args.max_num_seqs)
        self.admission = Admission(
            args.max_num_seqs, args.max_queued_requests, self.metrics.rejected
        )
        self._models = ServedModels(args.model_name, AdapterTable())
        self._args = args

    def app(self, render_metrics: Callable[[], Awaitable[bytes]] | None = None) -> ASGIApp:
        """Return the HTTP application.

        ``render_metrics`` makes what ``/metrics`` answers: one of several replicas passes the
        metrics of all. None: this server's own.
        """
        frame = Frame(self.thread.problem, self.admission, render_metrics or self._own_metrics)
        endpoint = ForecastEndpoint(self.thread, self.admission, self._models)
        longest = self.thread.forecaster.model.most_points
        routes = [*ModelRoutes(self._models, longest).routes(), *endpoint.routes()]
        return frame.app(routes, self._args.api_key, self._args.cors_origin)

    async def _own_metrics(self) -> bytes:
        return self.metrics.render()

    def end_files(self) -> None:
        """Write the end of the log, when no forecast follows."""
        if self._store is not None:
            self._store.statistics.close()

    def close(self) -> None:
        """Stop the threads."""
        self.thread.stop()
        self.end_files()
        if self._store is not None:
            self._store.close()


def _count_routings(forecaster: Forecaster, metrics: SeriesMetrics) -> None:
    """Let the metrics see the routings of every forward."""

    def see(_: torch.nn.Module, __: object, output: ModelOutput) -> None:
        metrics.count_routing(output.routings)

    forecaster.model.register_forward_hook(see)
