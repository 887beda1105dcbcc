"""A user's DeepSpeed JSON file: which of its keys go on to DeepSpeed, and which contradict the run.

A key is named with its sections: ``zero_optimization.stage``. The value ``auto``, which other
trainers fill in, means "as the run says".
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

PASSED_SECTIONS = {"comms_logger", "flops_profiler", "timers"}
PASSED = {
    *("dump_state", "log_level", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"),
    *(
        f"zero_optimization.{name}"
        for name in (
            *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients"),
            *("enable_sanity_checks", "ignore_unused_parameters", "log_trace_cache_warnings"),
            *("max_live_parameters", "max_reuse_distance", "model_persistence_threshold"),
            *("offload_optimizer.device", "offload_optimizer.pin_memory"),
            *("offload_param.device", "offload_param.pin_memory", "overlap_comm"),
            *("param_persistence_threshold", "prefetch_bucket_size", "reduce_bucket_size"),
            *("reduce_scatter", "stage", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
            *("stage3_model_persistence_threshold", "stage3_param_persistence_threshold"),
            *("stage3_prefetch_bucket_size", "use_multi_rank_bucket_allreduce"),
        )
    ),
}
"""Keys that go on to DeepSpeed."""
SET_HERE = {
    "amp.enabled": (False,),
    "communication_data_type": (None, "fp32"),
    "data_types.grad_accum_dtype": (None, "fp32"),
    "fp16.enabled": (False,),
    "gradient_predivide_factor": (1,),
    "optimizer.type": ("Adam", "AdamW"),
    "prescale_gradients": (False,),
    "sparse_gradients": (False,),
    "zero_allow_untested_optimizer": (True, False),
    "zero_force_ds_cpu_optimizer": (True, False),
    "zero_optimization.elastic_checkpoint": (True, False),
    "zero_optimization.memory_efficient_linear": (True, False),
    "zero_optimization.round_robin_gradients": (False,),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (True, False),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (True, False),
    "zero_optimization.sub_group_size": (1_000_000_000,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_gradients": (False,),
    "zero_optimization.zero_quantized_weights": (False,),
}
"""Keys that many files have, and the values that change nothing here."""
OFFLOADED = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")


@dataclass(frozen=True, slots=True)
class Own:
    """What the run says about something that the file has too."""

    name: str
    """The run's key."""
    value: Any
    """None if it is not known yet."""


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed JSON file; raise :class:`ConfigError` if it has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"parallel.deepspeed.config is {path}, which cannot be read "
            f"({(error.strerror or str(error)).lower()}); give the path of a DeepSpeed JSON file "
            "or leave it out."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"parallel.deepspeed.config is {path}, which is not text; give a JSON file."
        ) from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"parallel.deepspeed.config is {path}, which is not JSON in line {error.lineno} "
            f"({error.msg.lower()}); correct it there."
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"parallel.deepspeed.config is {path}, which holds {json.dumps(found)[:40]} and not "
            "DeepSpeed's keys; give a file that holds an object."
        )
    return found


def passed_on(path: Path, found: Mapping[str, Any], own: Mapping[str, Own]) -> dict[str, Any]:
    """Return the keys and values of a file that go on to DeepSpeed.

    Raises :class:`ConfigError` for the first key that contradicts ``own`` or that the run has no
    use for.
    """
    passed = {}
    for key, value in _leaves(found, ""):
        if value == "auto":
            continue
        problem = _problem(key, value, own)
        if problem is not None:
            raise ConfigError(f"{path} has {key} = {json.dumps(value)}, but {problem}.")
        if key in PASSED or key.partition(".")[0] in PASSED_SECTIONS:
            passed[key] = value
    return passed


def _problem(key: str, value: Any, own: Mapping[str, Own]) -> str | None:
    """Return what is wrong with a key, or None."""
    if key in own:
        ours = own[key]
        if ours.value is None or value == ours.value:
            return None
        return (
            f"{ours.name} is {json.dumps(ours.value)}; make the two equal or leave the key out of "
            "the file"
        )
    if key in SET_HERE:
        return None if value in SET_HERE[key] else "moeyard does not do that; leave the key out"
    if key in OFFLOADED and value not in ("none", "cpu"):
        return "moeyard has the optimizer's state in memory; use cpu or none"
    if key in PASSED or key.partition(".")[0] in PASSED_SECTIONS:
        return None
    if key.partition(".")[0] in ("optimizer", "scheduler"):
        return "the run's section optimizer says how weights change; leave it out of the file"
    return "moeyard does not hand that to DeepSpeed; leave the key out"


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield each key with its sections, and its value; of sections that are off, nothing else."""
    if prefix and section.get("enabled") in (False, "auto"):
        yield f"{prefix}enabled", section["enabled"]
        return
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys with their sections as a tree."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree
