"""What stages of layers (``parallel.pp``) ask of a run."""

from typing import Any, Protocol

from ..moe.config.model import LayersConfig, ModelConfig
from .parallel_config import ParallelConfig


class Run(Protocol):
    """A run's configuration, as far as stages are concerned."""

    @property
    def model(self) -> LayersConfig:
        """The model."""

    @property
    def parallel(self) -> ParallelConfig:
        """How ranks share the work."""

    @property
    def train(self) -> Any:
        """The loop."""

    @property
    def data(self) -> Any:
        """Where tokens come from."""

    @property
    def optimizer(self) -> Any:
        """How parameters are updated."""

    @property
    def monitor(self) -> Any:
        """Who watches the run."""


def problem_with_stages(run: Run) -> str | None:
    """Return why the run cannot be split into stages as it says, or None."""
    parallel, model, accumulation = run.parallel, run.model, run.train.accumulation
    stages = parallel.pp
    if stages == 1:
        if parallel.pp_schedule == type(parallel).model_fields["pp_schedule"].default:
            return None
        return (
            f"parallel.pp_schedule is {parallel.pp_schedule}, but parallel.pp is 1, so there are "
            "no stages; raise parallel.pp or leave pp_schedule out."
        )
    if not isinstance(model, ModelConfig):
        return (
            f"parallel.pp is {stages}, but model.kind is {model.kind}, which is not split into "
            "stages; set parallel.pp to 1."
        )
    if model.num_layers % stages:
        return (
            f"parallel.pp is {stages}, which does not divide model.num_layers = "
            f"{model.num_layers}; choose a divisor of {model.num_layers}."
        )
    if parallel.pp_schedule == "1f1b" and accumulation < stages:
        return (
            f"train.accumulation is {accumulation}, but parallel.pp is {stages}, and the schedule "
            f"1f1b needs a micro-batch for each stage; raise train.accumulation to {stages}, or "
            "use pp_schedule: gpipe."
        )
    if model.moe is not None and model.moe.router.pools_layers():
        return (
            f"parallel.pp is {stages}, but the router takes its balance loss over all layers of "
            "the model, and a stage has some of them; set balance_over to layer."
        )
    return _problem_with_others(run)


def _problem_with_others(run: Run) -> str | None:
    """Return which other option does not go with stages, or None."""
    parallel, train = run.parallel, run.train
    refused = {
        "parallel.dense": (parallel.dense, parallel.dense == "ddp", "use ddp"),
        "parallel.copies": ("given", parallel.copies is None, "leave it out"),
        "parallel.chunks": (parallel.chunks, parallel.chunks != "auto", "use a number"),
        "parallel.gradient_slices": (
            parallel.gradient_slices,
            parallel.gradient_slices is None,
            "leave it out",
        ),
        "optimizer.kind": (run.optimizer.kind, run.optimizer.kind == "adamw", "use adamw"),
        "optimizer.shard_experts": (
            run.optimizer.shard_experts,
            not run.optimizer.shard_experts,
            "leave it out",
        ),
        "train.parameters": (train.parameters, train.parameters == "all", "train all"),
        "data.format": (run.data.format, run.data.has_whole_windows, "use text"),
        "monitor.routes": ("given", run.monitor.routes is None, "leave it out"),
    }
    for name, (value, is_right, remedy) in refused.items():
        if not is_right:
            return (
                f"{name} is {value}, which does not know stages, but parallel.pp is {parallel.pp}; "
                f"{remedy}, or set parallel.pp to 1."
            )
    return None
