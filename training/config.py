"""The configuration of a training run: one YAML file, typed here."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..dtypes import short_name
from ..moe.config.kinds import ModelSection
from ..moe.config.model import decoder_config
from .averages_check import problem_with_averages
from .checkpoint_config import CheckpointConfig
from .expert_memory_check import problem_with_expert_memory
from .formats.table import DataSection
from .formats.text import TextConfig, TextsConfig
from .formats.tokens import TokensConfig
from .lora_config import LoraConfig, problem_with_lora
from .monitor_config import MonitorConfig
from .optimizers.adamw import AdamWConfig
from .optimizers.check import problem_with_optimizer
from .optimizers.sparse_experts import SparseExpertsConfig, problem_with_sparse_experts
from .optimizers.table import OptimizerSection
from .parallel_check import problem_with_parallel
from .parallel_config import ParallelConfig
from .publish_config import PublishConfig
from .section import Section
from .stages_check import problem_with_stages


class TrainConfig(Section):
    """The loop."""

    steps: int = Field(ge=1)
    """Optimizer steps of the run; raise it to go on with a finished run."""
    sequence_length: int = Field(default=256, ge=1)
    """Tokens per sequence."""
    parameters: Literal["all", "router", "lora"] = "all"
    """What trains: everything, the routers alone, or low-rank updates (``lora``) of frozen weights.
    Frozen weights have no gradients, no optimizer state and, under bf16, no fp32 masters."""
    expert_memory: str | None = None
    """Memory for frozen experts, ``8GiB`` or ``25%`` of them: each rank reads the others from the
    ``start_from`` folder when forward and backward need them. Numbers do not change. None keeps all
    in memory as parameters."""
    batch_sequences: int = Field(default=16, ge=1)
    """Sequences of the global batch, over all ranks and micro-batches."""
    packing: Literal["none", "documents"] = "none"
    """``documents``: a window's documents do not see each other, and each counts its positions from
    0. ``none``: attention spans the whole window."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per step; balance losses are taken over each, across all ranks."""
    precision: Annotated[Literal["fp32", "bf16", "fp64"], BeforeValidator(short_name)] = "fp32"
    """bf16 (or bfloat16) keeps fp32 master weights and main gradients, and the router in fp32."""
    sparse_experts: SparseExpertsConfig | None = None
    """Train routed experts that are N:M sparse; None = dense ones."""
    recompute: Literal[True, False, "experts"] = False
    """Drop each layer's activations and compute them again in backward. ``experts`` drops only the
    experts' pre-activations, which costs two thirds of their forward again."""
    log_every: int = Field(default=10, ge=1)
    """Steps between records in ``metrics.jsonl``."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 = only after the last step."""
    eval_sequences: int = Field(default=64, ge=1)
    """Most held-out sequences per evaluation; they are spread evenly over the held-out data."""


class RunConfig(Section):
    """A training run."""

    run_dir: str
    """Folder of the run. If it holds a run, that run is resumed."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, data order and router noise."""
    start_from: str | None = None
    """A Hugging Face folder, or a name on the hub (``OWNER/MODEL``), whose weights training starts
    from. ``model`` and ``data.tokenizer`` then default to the folder's."""
    ignore_unused_weights: bool = False
    """Skip the folder's weights that its config.json does not ask for, instead of refusing it."""
    model: ModelSection
    """Without ``kind`` it is a decoder."""
    data: DataSection = TextConfig()
    """Without ``format`` it is text."""
    train: TrainConfig
    lora: LoraConfig | None = None
    """Only with ``train.parameters: lora``, which fills in the defaults."""
    optimizer: OptimizerSection = AdamWConfig()
    """What updates the weights, and the learning rate. Without ``kind`` it is AdamW."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    monitor: MonitorConfig = MonitorConfig()
    publish: PublishConfig | None = None
    """Publish weights for servers that follow the run; None = do not."""

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer of a run on tokens."""
        assert isinstance(self.data, TokensConfig), "only rows that are tokens have one"
        return self.data.tokenizer

    @property
    def text_data(self) -> TextsConfig:
        """The ``data`` section of a run on texts."""
        assert isinstance(self.data, TextsConfig), "an objective on texts has texts"
        return self.data

    @property
    def routed_layers(self) -> list[int]:
        """The layers that choose experts, or LoRA experts, for tokens."""
        if self.lora is not None and self.lora.mixture is not None:
            return list(range(self.model.num_layers))
        return self.model.moe_layers

    @model_validator(mode="before")
    @classmethod
    def _fill_in_lora(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        train = values.get("train")
        if isinstance(train, dict) and train.get("parameters") == "lora":
            values = values | {"lora": values.get("lora") or {}}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = self.parallel.problem_with_path()
        if problem is not None:
            raise ValueError(problem)
        if self.train.batch_sequences % self.train.accumulation:
            raise ValueError(
                f"train.batch_sequences is {self.train.batch_sequences}, which train.accumulation "
                f"= {self.train.accumulation} does not divide; choose a multiple."
            )
        if self.train.sequence_length > self.model.max_positions:
            raise ValueError(
                f"train.sequence_length is {self.train.sequence_length}, but model.max_positions "
                f"is {self.model.max_positions}; lower the one or raise the other."
            )
        if self.model.moe is None and self.parallel.ep > 1:
            raise ValueError(
                f"parallel.ep is {self.parallel.ep}, but the model has no experts; "
                "set parallel.ep to 1 or give model.moe."
            )
        if self.model.moe is None and self.monitor.routes is not None:
            raise ValueError(
                "monitor.routes is given, but the model has no experts; leave it out or give "
                "model.moe."
            )
        if not self.model.layers_share_rows and self.monitor.routes is not None:
            raise ValueError(
                f"monitor.routes is given, but in a model of kind {self.model.kind} some layers "
                "read other rows than others, which a route file does not know; leave it out."
            )
        moe = self.model.moe
        reason = None if moe is None else moe.router.why_not_among(self.model.rows_have)
        if reason is not None:
            raise ValueError(f"model.moe.{reason}")
        has_lora = self.lora is not None and "experts" in self.lora.targets
        problem = self._problem_with_parameters()
        if problem is None:
            has_windows = self.data.has_whole_windows and self.train.packing == "none"
            length = self.train.sequence_length if has_windows else None
            problem = problem_with_parallel(self.parallel, moe, length, has_lora)
        if problem is None:
            trains_experts = moe is not None and (self.train.parameters == "all" or has_lora)
            problem = problem_with_optimizer(
                self.optimizer, self.parallel, self.train.parameters, trains_experts
            )
        problem = problem or problem_with_stages(self) or problem_with_sparse_experts(self)
        problem = problem or problem_with_averages(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _problem_with_parameters(self) -> str | None:
        """Return why the chosen parameters cannot be trained, or None."""
        chosen, moe = self.train.parameters, self.model.moe
        if self.train.expert_memory is not None:
            problem = problem_with_expert_memory(
                *(self.train.expert_memory, chosen, self.train.precision, moe),
                has_start=self.start_from is not None,
                parallel=self.parallel,
            )
            if problem is not None:
                return problem
        if chosen != "all" and self.parallel.copies is not None:
            return (
                f"parallel.copies is given, but train.parameters is {chosen}, and only trained "
                "experts have copies; leave parallel.copies out or train all."
            )
        if chosen == "router" and (moe is None or not moe.router.learns):
            found = "has no experts"
            if moe is not None:
                found = f"has {moe.router.kind} routers, which learn nothing"
            return f"train.parameters is router, but the model {found}; use all or lora."
        if chosen == "lora" and not self.model.generates:
            return (
                f"train.parameters is lora, but model.kind is {self.model.kind}, whose weights "
                "have no low-rank updates; use all or router."
            )
        if chosen != "lora" and self.lora is not None:
            return (
                f"lora is given, but train.parameters is {chosen}; set train.parameters to lora "
                "or leave lora out."
            )
        if self.lora is None:
            return None
        return problem_with_lora(self.lora, decoder_config(self.model))
