"""From a run's configuration to a workload on paper, and from a run's folder to measured steps."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..configuration import read_values
from ..errors import ConfigError
from ..moe.config.model import ModelConfig
from ..parallel.planning.placement import Placement
from ..parallel.planning.plan_file import read_plan
from ..parallel.simulation.choices import Choices
from ..parallel.simulation.fit import Measured
from ..parallel.simulation.workload import Workload
from .config import RunConfig
from .data.tokenizer import open_tokenizer
from .read_config import complete_run_config, read_run_config
from .run.starts import STARTS

KNOWN_FORMATS = ("text", "chat")
KNOWN_DENSE = ("ddp", "fsdp")
PHASES = ("forward", "backward", "reduce", "optimizer")
"""Those that a simulation has; ``data`` is in its ``rest``."""
WARM_UP = 1
"""Records at a run's start that do not count."""


def read_paper_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration; a tokenizer is only needed where it decides the vocabulary."""
    values = read_values(path, overrides)
    model, data = values.get("model"), values.get("data")
    if isinstance(model, dict) and model.get("vocab_size") and isinstance(data, dict):
        values["data"] = {key: value for key, value in data.items() if key != "tokenizer"}
    return complete_run_config(values)


def workload_of(config: RunConfig) -> Workload:
    """Return what is simulated; raise :class:`ConfigError` for settings without formulas."""
    train, parallel = config.train, config.parallel
    problem = _problem_with(config)
    if problem is not None:
        raise ConfigError(problem)
    model = config.model
    assert isinstance(model, ModelConfig), "which has no problem"
    if model.vocab_size is None:
        size = open_tokenizer(config.text_data.tokenizer).vocab_size
        model = model.model_copy(update={"vocab_size": size})
    copies = parallel.copies
    return Workload(
        model=model,
        sequence_length=train.sequence_length,
        batch_sequences=train.batch_sequences,
        accumulation=train.accumulation,
        precision=train.precision,
        recompute=train.recompute,
        ep=parallel.ep,
        expert_tp=parallel.expert_tp,
        path=parallel.path,
        chunks=parallel.chunks,
        backward_chunks=parallel.backward_chunks,
        dense=parallel.dense,
        has_gradient_slices=parallel.gradient_slices is not None,
        copy_bytes=None if copies is None else copies.max_bytes,
        copy_experts=None if copies is None else copies.experts,
        rematerializes=copies is not None and copies.rematerialize,
        shards_experts=config.optimizer.shard_experts,
    )


def _problem_with(config: RunConfig) -> str | None:
    """Return which setting has no formulas here, or None."""
    train, parallel = config.train, config.parallel
    if not isinstance(config.model, ModelConfig):
        return f"model.kind is {config.model.kind}, which simulate does not know; use a decoder."
    if config.data.format not in KNOWN_FORMATS:
        return (
            f"data.format is {config.data.format}, which simulate does not know; use "
            f"{' or '.join(KNOWN_FORMATS)}."
        )
    if train.parameters != "all":
        return (
            f"train.parameters is {train.parameters}, which simulate does not know: it needs the "
            "time of frozen weights; use all."
        )
    if parallel.dense not in KNOWN_DENSE:
        return (
            f"parallel.dense is {parallel.dense}, which simulate does not know; use one of "
            f"{', '.join(KNOWN_DENSE)}."
        )
    kind = config.optimizer.kind
    if kind != "adamw":
        return f"optimizer.kind is {kind}, which simulate does not know; use adamw."
    if config.optimizer.shard_experts:
        return "optimizer.shard_experts is true, which simulate does not know; leave it out."
    if parallel.path == "hierarchical" and parallel.expert_tp > 1:
        return (
            "parallel.path is hierarchical with expert_tp, whose three levels simulate does not "
            "know; use all_to_all, or expert_tp 1."
        )
    return None


def owners_of(config: RunConfig, work: Workload) -> list[Placement]:
    """Return the owners that a plan gives to the experts of each MoE layer; empty without one."""
    copies = config.parallel.copies
    if copies is None or copies.plan is None:
        return []
    plan = read_plan(Path(copies.plan), work.model, work.ep)
    return [plan.placement_of(layer).owners_only for layer in plan.layers]


def choices_of(load_LE: Sequence[Sequence[int]], work: Workload) -> list[Choices]:
    """Return how tokens choose in each MoE layer, from the rows of each expert."""
    assert work.model.moe is not None, "loads of a model without experts"
    k = work.model.moe.router.k
    return [Choices.of_loads(np.asarray(load_E), k) for load_E in load_LE]


def measured_run(run_dir: Path) -> Measured:
    """Return the steps that a run's folder has recorded, without those of its first record.

    Raises :class:`ConfigError` for a folder that is not a run, or has no more than one record.
    """
    config = read_run_config(run_dir / "config.yaml")
    work = workload_of(config)
    starts = _lines(run_dir / STARTS)
    records = [record for record in _lines(run_dir / "metrics.jsonl") if "phases_s" in record]
    if not starts or len(records) <= WARM_UP:
        raise ConfigError(
            f"{run_dir} has {len(records)} record(s) of steps, and the first does not count; train "
            "some steps with a smaller train.log_every."
        )
    kept = records[WARM_UP:]
    phases_s = {name: median(record["phases_s"][name] for record in kept) for name in PHASES}
    step_s = sum(phases_s.values()) + median(record["phases_s"]["data"] for record in kept)
    loads = np.sum([record["expert_tokens"] for record in kept], axis=0)
    choices_L = choices_of(loads.tolist(), work) if work.model.moe is not None else []
    return Measured(run_dir.name, work, int(starts[-1]["ranks"]), step_s, phases_s, choices_L)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the folder of a training run."
        ) from None
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # a killed run may leave half a line
    return found
