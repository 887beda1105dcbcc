"""What a run with ``parallel.dense: deepspeed`` hands to DeepSpeed, and what it cannot do.

The run's own configuration comes first. The user's JSON file (deepspeed_file.py) adds to it.
"""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import RunConfig
from .deepspeed_file import Own, nested, passed_on, read_file
from .parallel_config import DeepSpeedConfig

DEFAULT_STAGE = 2
AT_ONCE = 1 << 50
"""Numbers of a group that is updated at once: more than a rank can have."""
OFFLOAD = "zero_optimization.offload_optimizer.device"
STAGE = "zero_optimization.stage"


def check_deepspeed(config: RunConfig) -> None:
    """Raise :class:`ConfigError` for whatever is wrong with DeepSpeed on any number of ranks."""
    if deepspeed_settings(config) is not None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "parallel.dense is deepspeed, but that package is not installed; install it with "
            "pip install 'moeyard[deepspeed]', or use fsdp."
        )


def deepspeed_settings(config: RunConfig, ranks: int | None = None) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration for a run on ``ranks``, or None if it does not use it.

    Raises :class:`ConfigError` for options and keys of the user's file that do not go together.
    Without ``ranks``, what depends on their number is not checked.
    """
    parallel = config.parallel
    if parallel.dense != "deepspeed":
        if parallel.deepspeed is not None:
            raise ConfigError(
                f"parallel.deepspeed is given, but parallel.dense is {parallel.dense}; set "
                "parallel.dense to deepspeed or leave parallel.deepspeed out."
            )
        return None
    if ranks == 1:
        raise ConfigError(
            "parallel.dense is deepspeed, but the run has one process, so ZeRO has nothing to "
            "split; start several with --nproc, or use ddp."
        )
    options = parallel.deepspeed or DeepSpeedConfig()
    flat = _from_file(config, options, ranks)
    stage = flat.setdefault(STAGE, DEFAULT_STAGE)
    flat.setdefault(OFFLOAD, "none")
    problem = _problem(config, stage, flat)
    if problem is not None:
        raise ConfigError(problem)
    return nested(flat | _fixed(config, ranks or 1))


def _from_file(config: RunConfig, options: DeepSpeedConfig, ranks: int | None) -> dict[str, Any]:
    """Return the keys that the user's file and the run's options give."""
    own = _own(config, options, ranks)
    flat = {}
    if options.config is not None:
        path = Path(options.config)
        flat = passed_on(path, read_file(path), own)
    return flat | {key: own[key].value for key in (STAGE, OFFLOAD) if key in own}


def _own(config: RunConfig, options: DeepSpeedConfig, ranks: int | None) -> dict[str, Own]:
    """Return what the run says about DeepSpeed's keys."""
    train, optimizer = config.train, config.optimizer
    own = {
        "train_batch_size": Own("train.batch_sequences", train.batch_sequences),
        "gradient_accumulation_steps": Own("train.accumulation", train.accumulation),
        "gradient_clipping": Own("optimizer.clip_norm", optimizer.clip_norm),
        "bf16.enabled": Own("train.precision = bf16", train.precision == "bf16"),
        "optimizer.params.lr": Own("optimizer.lr", optimizer.lr),
        "optimizer.params.betas": Own("optimizer.betas", list(optimizer.betas)),
        "optimizer.params.eps": Own("optimizer.eps", optimizer.eps),
        "optimizer.params.weight_decay": Own("optimizer.weight_decay", optimizer.weight_decay),
    }
    share = None if ranks is None else train.batch_sequences // (train.accumulation * ranks)
    name = f"the share of train.batch_sequences on {ranks} ranks"
    own["train_micro_batch_size_per_gpu"] = Own(name, share)
    if options.zero_stage is not None:
        own[STAGE] = Own("parallel.deepspeed.zero_stage", options.zero_stage)
    if options.offload_optimizer is not None:
        device = "cpu" if options.offload_optimizer else "none"
        own[OFFLOAD] = Own("parallel.deepspeed.offload_optimizer", device)
    return own


def _problem(config: RunConfig, stage: Any, flat: dict[str, Any]) -> str | None:
    """Return what ZeRO of this stage cannot do with the run, or None."""
    given, train = f"parallel.deepspeed has ZeRO stage {stage}", config.train
    if stage not in (0, 1, 2, 3):
        return f"{given}, which does not exist; use 0, 1, 2 or 3."
    if train.precision == "fp64":
        return (
            "train.precision is fp64, but parallel.dense is deepspeed, which has fp32 masters; use "
            "fp32 or bf16, or set parallel.dense to ddp."
        )
    if train.parameters == "router":
        return (
            "train.parameters is router, but parallel.dense is deepspeed, and routers are whole on "
            "every rank, so ZeRO has nothing to split; set parallel.dense to ddp."
        )
    targets = () if config.lora is None else config.lora.targets
    if config.lora is not None and config.lora.experts:
        return (
            f"lora.experts is {config.lora.experts}, but parallel.dense is deepspeed, which has "
            "not been tried with LoRA experts; set parallel.dense to ddp or fsdp."
        )
    if train.parameters == "lora" and not {"attention", "mlp"} & set(targets):
        return (
            f"lora.targets is {list(targets)}, but parallel.dense is deepspeed, which has no dense "
            "parameters to split then; set parallel.dense to ddp."
        )
    if stage == 3 and train.parameters == "lora":
        return (
            f"{given}, but train.parameters is lora, whose frozen weights it would split too; use "
            "stage 2 or set parallel.dense to fsdp."
        )
    if stage == 0 and train.precision == "bf16":
        return (
            f"{given}, but train.precision is bf16, and DeepSpeed sums bf16 gradients in fp32 from "
            "stage 1 only; use stage 1, 2 or 3."
        )
    if stage == 0 and flat[OFFLOAD] != "none":
        return (
            f"{given}, but the optimizer is to be offloaded, which DeepSpeed does from stage 1; "
            "use stage 1, 2 or 3, or leave the optimizer where it is."
        )
    if stage != 3 and flat.get("zero_optimization.offload_param.device", "none") != "none":
        return (
            f"{given}, but parameters are to be offloaded, which DeepSpeed does in stage 3; use "
            "stage 3 or leave zero_optimization.offload_param out."
        )
    return None


def _fixed(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return what is the same whatever the user asks for.

    DeepSpeed counts no micro-batches: the engine tells it which is the last. Its clipping is off.
    """
    share = max(1, config.train.batch_sequences // (config.train.accumulation * ranks))
    return {
        "train_batch_size": share * ranks,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16.enabled": config.train.precision == "bf16",
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization.memory_efficient_linear": False,
        "zero_optimization.sub_group_size": AT_ONCE,
    }
