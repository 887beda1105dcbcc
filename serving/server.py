"""Put model, engine and HTTP application together from a server's arguments."""

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, field_validator
from starlette.types import ASGIApp

from ..dtypes import short_name
from ..moe.folders.folder import ModelFolder
from ..moe.folders.generation_config import read_generation_config
from ..moe.folders.hub import hub_name, local_folder, pinned
from ..moe.routers.causal import check_causal
from ..moe.routers.own_code import allow
from ..moe.routes.reader import SUFFIX
from .api.adapters import ServedModels
from .api.http_app import HttpApi
from .engine.admission import Admission
from .engine.engine import Engine, check_length
from .engine.route_recorder import RouteRecorder
from .engine.thread import EngineThread
from .engine.tokenizer import ServingTokenizer
from .experts.budget import bytes_of_experts, host_bytes
from .experts.copies import check_fallback
from .experts.event_log import SUFFIX as LOG_SUFFIX
from .experts.options import StoreOptions
from .experts.predictors.table import check_fit
from .experts.tiers.shared_memory import check_shared_memory
from .load_checks import check_options
from .loading import open_model, pick_dtype
from .lora_args import LoraArgs, check_adapters
from .memory import check_memory
from .replica_files import check_replica_files, replica_file


class ServeArgs(LoraArgs):
    """Arguments of ``moeyard serve``, of ``serve run`` and of a deployment's YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A Hugging Face model folder, or a name on the hub such as ``OWNER/MODEL@REVISION``."""
    served_model_name: str | None = None
    """Name clients use; None = the folder's name, or the one on the hub."""
    expert_memory: str | None = None
    """Bound on the experts kept in memory (2GiB, 25%); auto is what the machine can spare, None
    keeps all."""
    expert_policy: str = "decayed_lfu"
    """Which expert leaves memory when another one is needed."""
    host_memory: str | None = None
    """Memory of each node for further experts (8GiB, 50% of all), in Ray's object store and shared
    by the node's replicas; None or 0 = none."""
    expert_sparsity: str | None = None
    """A file of ``moeyard sparsity``: channels of experts that count as 0 are not read; or
    ``exact``, for what gates make 0."""
    expert_reader: Literal["auto", "buffered", "direct"] = "auto"
    """Read experts through the page cache, around it, or as a probe at the start finds better."""
    expert_fallback: str | None = None
    """Folder of the same model in fewer bits: experts that are missing are computed from it."""
    expert_fallback_above: float | None = None
    """Experts with more than this share of the rows' weights are waited for; None = none are."""
    expert_log: str | None = None
    """Folder for the events of expert stores, a file for each replica."""
    record_routes: str | None = None
    """Folder for routes, a file for each replica: which experts each token visited."""
    expert_predictor: str = "none"
    """What is read ahead for routers that choose late: a predictor's name, or ``NAME:FILE``."""
    dtype: Annotated[Literal["fp32", "bf16"], BeforeValidator(short_name)] | None = None
    """``bf16`` (or ``bfloat16``), ``fp32`` (or ``float32``); None = as stored."""
    max_num_seqs: int = Field(default=8, ge=1)
    """Requests in the batch; more wait."""
    max_queued_requests: int = Field(default=64, ge=0)
    """Requests that wait beyond the batch; more are refused with 429."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and answer together; None = what the model takes."""
    prefill_chunk: int = Field(default=256, ge=1)
    """Prompt tokens read per step."""
    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads; None = the cores this process may use, shared between the replicas."""
    num_replicas: int = Field(default=1, ge=1)
    """Processes that serve the model, each with its own engine and experts."""
    drain_timeout: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that running requests get to finish when the server or a replica stops."""
    api_key: str | None = None
    """Key clients must send; None asks for none. With Ray's own commands the default is the value
    of ``MOEYARD_API_KEY`` where the application is built."""
    cors_origin: list[str] = []
    """Origins of web pages that may call the server from a browser, such as
    ``http://localhost:3000``; ``*`` permits all. A string may join some by ``,``."""
    ignore_unused_weights: bool = False
    """Skip the folder's weights that its config.json does not ask for, instead of refusing it."""
    allow_code: list[str] = []
    """Modules of the user's own whose routers the folder may use; a string may join some by ``,``.
    Every replica imports them."""
    chat_template: str | None = None
    """A Jinja file, or the name of one of the model folder's templates where it has several."""

    @field_validator("allow_code", "cors_origin", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        return names.split(",") if isinstance(names, str) else names

    @field_validator("cors_origin")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin; use SCHEME://HOST[:PORT] without a path, or *."
                )
        return origins

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: str | None) -> str | None:
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise ValueError("the key is empty or holds blanks; use printable ASCII.")
        return key

    @property
    def model_name(self) -> str:
        """The name clients use."""
        on_hub = hub_name(self.model)
        own = Path(self.model).resolve().name if on_hub is None else on_hub[0]
        return self.served_model_name or own

    @property
    def store_options(self) -> StoreOptions:
        """How the expert store works, apart from its log, which each replica names."""
        return StoreOptions(
            policy=self.expert_policy,
            predictor=self.expert_predictor,
            reader=self.expert_reader,
            sparsity=self.expert_sparsity,
            host_memory=self.host_memory,
            fallback=None if self.expert_fallback is None else Path(self.expert_fallback),
            fallback_above=self.expert_fallback_above,
        )

    def open_tokenizer(self) -> ServingTokenizer:
        """Open the model's tokenizer."""
        return ServingTokenizer(local_folder(self.model), self.chat_template)


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
    folder.check(ignore_unused_weights=args.ignore_unused_weights)
    if folder.config.moe is not None:
        check_causal(folder.config.moe.router)
    dtype = pick_dtype(folder, args.dtype)
    read_generation_config(folder)
    args.open_tokenizer().close()
    check_replica_files(folder.config, args.record_routes, args.expert_log, args.expert_memory)
    log = None if args.expert_log is None else Path(args.expert_log)
    check_options(replace(args.store_options, log=log), args.expert_memory)
    copies = check_fallback(folder, args.store_options, dtype)
    if args.expert_memory is not None:
        check_fit(args.expert_predictor, folder.config)
    bytes_of_experts(folder, dtype, args.expert_memory)
    host = host_bytes(folder, dtype, args.host_memory)
    if runs_here:
        check_memory(folder, dtype, args.expert_memory, args.num_replicas, host, copies)
        check_shared_memory(host)
    check_adapters(args, folder, args.model_name, args.api_key, args.num_replicas)
    folder.close()
    check_length(args.max_model_len, folder.config.max_positions)


class Server:
    """A running model: engine thread, admission and HTTP application."""

    def __init__(self, args: ServeArgs, replica: str = "server") -> None:
        share = max(1, len(os.sched_getaffinity(0)) // args.num_replicas)
        torch.set_num_threads(args.num_threads or share)
        options = args.store_options
        if args.expert_log is not None:
            path = replica_file(args.expert_log, replica, "expert-log", LOG_SUFFIX)
            options = replace(options, log=path)
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
        )
        self.metrics = engine.metrics
        self.thread = EngineThread(engine)
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
        self.thread.stop()
        self.end_files()
        self._tokenizer.close()
        if self._store is not None:
            self._store.close()

    def end_files(self) -> None:
        """Write the ends of recorded routes and of the log, when no forward follows."""
        if self._recorder is not None:
            self._recorder.close()
        if self._store is not None:
            self._store.statistics.close()
