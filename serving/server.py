"""Put model, engine and HTTP application together from a server's arguments."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import torch
from starlette.types import ASGIApp

from ..moe.config.model import decoder_config
from ..moe.folders.folder import ModelFolder
from ..moe.folders.generation_config import read_generation_config
from ..moe.folders.hub import local_folder, pinned
from ..moe.routers.causal import check_causal
from ..moe.routers.own_code import allow
from ..moe.routes.reader import SUFFIX
from .api.adapters import ServedModels
from .api.http_app import HttpApi
from .engine.admission import Admission
from .engine.drafts.checks import check_speculative
from .engine.engine import Engine
from .engine.request_checks import check_length
from .engine.route_recorder import RouteRecorder
from .engine.thread import EngineThread
from .expert_parallel.sharding import ShardedModel
from .expert_parallel_args import bytes_elsewhere, check_owners_fit
from .experts.budget import bytes_of_experts, host_bytes
from .experts.copies import check_fallback
from .experts.event_log import SUFFIX as LOG_SUFFIX
from .experts.predictors.table import check_fit
from .experts.tiers.live import LiveTier
from .experts.tiers.shared_memory import check_shared_memory
from .follow_args import bytes_of_update, check_follow
from .live.open import follow
from .load_checks import check_options
from .loading import open_model, pick_dtype
from .lora_args import check_adapters
from .memory import check_memory
from .planning.budget import Demand
from .planning.kv import asked_kv_bytes
from .replica_files import check_replica_files, replica_file
from .serve_args import ServeArgs


def with_commit(args: ServeArgs) -> ServeArgs:
    """Download a model that is on the hub, and name its commit: every replica takes the same one.

    A replica on another machine downloads it there.
    """
    return args.model_copy(update={"model": pinned(args.model)})


def check_model(args: ServeArgs, runs_here: bool = False) -> None:
    """Refuse a folder, a tokenizer or a budget that cannot work; reads headers only.

    ``runs_here`` says that the replicas run on this machine, whose memory must hold the model.
    """
    allow(args.allow_code)
    folder = ModelFolder(local_folder(args.model))
    decoder_config(folder.config)
    folder.check(ignore_unused_weights=args.ignore_unused_weights)
    if folder.config.moe is not None:
        check_causal(folder.config.moe.router)
    dtype = pick_dtype(folder, args.dtype)
    read_generation_config(folder)
    args.open_tokenizer().close()
    check_replica_files(folder.config, args.record_routes, args.expert_log, args.expert_memory)
    log = None if args.expert_log is None else Path(args.expert_log)
    check_options(replace(args.store_options, log=log), args.expert_memory)
    check_speculative(args.speculative, args.record_routes, args.store_options.fallback)
    copies = check_fallback(folder, args.store_options, dtype)
    if args.expert_memory is not None:
        check_fit(args.expert_predictor, folder.config)
    bytes_of_experts(folder, dtype, args.expert_memory)
    host = host_bytes(folder, dtype, args.host_memory)
    demand = Demand(
        max_num_seqs=args.max_num_seqs, max_model_len=args.max_model_len, kv_dtype=args.kv_dtype
    )
    kv = asked_kv_bytes(folder, dtype, args.kv_memory, demand) or 0
    check_owners_fit(args, folder)
    copies += bytes_elsewhere(folder, dtype, args.expert_memory, args.expert_parallel)
    check_follow(args, folder)
    copies += bytes_of_update(args, folder, dtype, args.expert_memory)
    if runs_here:
        check_memory(folder, dtype, args.expert_memory, args.most_replicas, host, copies, kv)
        check_shared_memory(host)
    check_adapters(args, folder, args.model_name, args.api_key, args.most_replicas)
    folder.close()
    check_length(args.max_model_len, folder.config.max_positions)


class Server:
    """A running model: engine thread, admission and HTTP application."""

    def __init__(self, args: ServeArgs, replica: str = "server") -> None:
        share = max(1, len(os.sched_getaffinity(0)) // args.most_replicas)
        torch.set_num_threads(args.num_threads or share)
        options = args.store_options
        if args.expert_log is not None:
            path = replica_file(args.expert_log, replica, "expert-log", LOG_SUFFIX)
            options = replace(options, log=path)
        self._sharding = None if args.expert_parallel == 1 else _sharding(args)
        options = replace(options, sharding=self._sharding)
        if args.follow is not None and args.expert_memory is not None:
            options = replace(options, live=LiveTier())
        model, self._store = open_model(
            args.model,
            args.dtype,
            expert_memory=args.expert_memory,
            options=options,
            ignore_unused_weights=args.ignore_unused_weights,
            allow_code=args.allow_code,
        )
        self._models = ServedModels(args.model_name, model.adapters)
        args.load_adapters(model.adapters)
        self._recorder = None
        if args.record_routes is not None:
            path = replica_file(args.record_routes, replica, "record-routes", SUFFIX)
            own = None if self._store is None else self._store.hint_column()
            self._recorder = RouteRecorder(model.decoder, path, own=own)
        tokenizer = self._tokenizer = args.open_tokenizer()
        engine = Engine(
            model,
            tokenizer.decode,
            self._store,
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            prefill_chunk=args.prefill_chunk,
            kv_memory=args.kv_memory,
            kv_dtype=args.kv_dtype,
            speculative=args.speculative,
            speculative_rows=args.speculative_rows,
            # A recording has all rows of each request.
            reuses_prefixes=not args.no_prefix_reuse and args.record_routes is None,
            shares_prompts=args.record_routes is None,
        )
        self.metrics = engine.metrics
        if self._sharding is not None and self._sharding.team is not None:
            self.metrics.registry.register(self._sharding.team.metrics)
        self.thread = EngineThread(engine)
        self._follower = None
        if args.follow is not None:
            where = (args.model, args.follow, model.decoder, self.thread)
            self._follower = follow(*where, self._store, options.live)
            self._models.live = self._follower.metrics.facts
        self.admission = Admission(
            args.max_num_seqs, args.max_queued_requests, engine.metrics.rejected
        )
        self._args = args

    def app(self, render_metrics: Callable[[], Awaitable[bytes]] | None = None) -> ASGIApp:
        """Return the HTTP application.

        ``render_metrics`` makes what ``/metrics`` answers: one of several replicas passes the
        metrics of all. None: this server's own.
        """
        api = HttpApi(
            self.thread,
            self._tokenizer,
            self.admission,
            self._models,
            render_metrics or self._own_metrics,
        )
        args = self._args
        return api.app(args.api_key, args.cors_origin, args.allow_lora_updates)

    async def _own_metrics(self) -> bytes:
        return self.metrics.render()

    def close(self) -> None:
        """Stop the threads."""
        if self._follower is not None:
            self._follower.close()
        self.thread.stop()
        self.end_files()
        self._tokenizer.close()
        if self._store is not None:
            self._store.close()
        if self._sharding is not None:
            self._sharding.close()

    def end_files(self) -> None:
        """Write the ends of recorded routes and of the log, when no forward follows."""
        if self._recorder is not None:
            self._recorder.close()
        if self._store is not None:
            self._store.statistics.close()


def _sharding(args: ServeArgs) -> ShardedModel:
    """Return how the experts of a replica are divided between it and Ray actors."""
    from .expert_parallel.ray_owners import RayOwners

    return ShardedModel(
        args.expert_parallel,
        RayOwners(),
        None if args.expert_placement is None else Path(args.expert_placement),
        policy=args.expert_policy,
        reader=args.expert_reader,
        allow_code=args.allow_code,
    )
