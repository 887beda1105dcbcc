"""The arguments of a server."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..dtypes import short_name
from ..moe.folders.hub import hub_name, local_folder
from .engine.tokenizer import ServingTokenizer
from .expert_parallel_args import ExpertParallelArgs, check_combination
from .experts.options import StoreOptions
from .follow_args import FollowArgs
from .lora_args import LoraArgs


class ServeArgs(LoraArgs, ExpertParallelArgs, FollowArgs):
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
    ``coreinfer:SHARE``, for those that a prompt uses least; or ``exact``, for what gates make 0."""
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
    """What is read ahead before routers have chosen: a predictor's name, or ``NAME:FILE``."""
    dtype: Annotated[Literal["fp32", "bf16"], BeforeValidator(short_name)] | None = None
    """``bf16`` (or ``bfloat16``), ``fp32`` (or ``float32``); None = as stored."""
    kv_memory: str | None = None
    """Memory for keys and values in each replica: 2GiB, or a share of what a full batch of the
    longest texts takes; None = that much, or what is free next to the weights."""
    kv_dtype: Literal["int8"] | None = None
    """Round keys and values to ``int8``, which is lossy; None = the model's type."""
    no_prefix_reuse: bool = False
    """Read every prompt whole, even where another request has read how it begins."""
    max_num_seqs: int = Field(default=8, ge=1)
    """Requests in the batch; more wait."""
    max_queued_requests: int = Field(default=64, ge=0)
    """Requests that wait beyond the batch; more are refused with 429."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and answer together; None = what the model takes."""
    prefill_chunk: int = Field(default=256, ge=1)
    """Prompt tokens read per step, of all requests together."""
    speculative: str = "none"
    """Guess next tokens and check several in one step, which changes no answer: ``ngram`` or
    ``suffix``."""
    speculative_rows: int = Field(default=16, ge=1)
    """Guessed tokens that one step checks at most, of all requests together."""
    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads; None = the cores this process may use, shared between the replicas."""
    num_replicas: int = Field(default=1, ge=1)
    """Processes that serve the model, each with its own engine and experts."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Replicas at busy times: there are ``num_replicas`` to this many, one for each full batch of
    answers that run or wait. None = always ``num_replicas``."""
    downscale_delay: float = Field(default=120.0, ge=0, allow_inf_nan=False)
    """Seconds that fewer replicas must have been enough before one is taken away."""
    prefix_routing: bool = False
    """Send requests that begin alike to one replica, unless it is busier than others."""
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

    @model_validator(mode="after")
    def _check_owners(self) -> Self:
        check_combination(self)
        return self

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

    @model_validator(mode="after")
    def _check_replicas(self) -> "ServeArgs":
        if self.most_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, but there are at least {self.num_replicas} "
                "replicas (num_replicas); use as many or more."
            )
        return self

    @property
    def most_replicas(self) -> int:
        """How many replicas there may be at a time."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas

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
