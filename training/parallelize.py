"""Turn a whole model into this rank's part of it, step by step."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..dtypes import torch_dtype
from ..errors import ConfigError
from ..moe.config.moe import MoEConfig
from ..moe.exchange import refill_averages
from ..moe.experts.path import ExpertPath
from ..moe.models.decoder import Decoder
from ..moe.models.lora import add_lora
from ..moe.models.model import Model
from ..parallel.dense.engine import DenseEngine
from ..parallel.dense.table import open_engine
from ..parallel.experts.materialized import MaterializedExperts
from ..parallel.experts.open_copies import CopyOptions, open_copies
from ..parallel.experts.open_path import PathKind, open_path
from ..parallel.experts.pipelined import Degrees, PipelinedPath
from ..parallel.mesh import Mesh
from ..parallel.planning.placement import Topology
from ..parallel.profiling.copies import measure_copies
from ..parallel.profiling.gradient_slices import GradientSlices
from .config import RunConfig
from .deepspeed_settings import deepspeed_settings
from .device import device, seed_rank
from .layer_shape import layer_shape
from .precision import apply_precision


@dataclass(frozen=True, slots=True)
class Parallel:
    """A model that is ready to train."""

    engine: DenseEngine
    wrapped: nn.Module
    """What a step calls: the loss of this rank's rows."""
    masters: dict[str, Tensor]
    """fp32 copies of the parameters that the run's precision narrowed."""
    copies: MaterializedExperts | None
    """Copies of busy experts, if the run makes any."""
    pipelines: Mapping[PathKind, PipelinedPath]
    """What can carry rows to experts in chunks: several to choose from where the path is auto, none
    where rows are never cut."""
    slices: GradientSlices | None
    """Who plans when dense gradients travel, if the run does not leave that to DDP."""


def parallelize(
    config: RunConfig, decoder: Model, loss: nn.Module, mesh: Mesh, rows_per_window: int
) -> Parallel:
    """Make ``decoder``, which holds fp32 weights, ready to train, in place.

    ``loss`` is the module whose forward runs the decoder. MoE layers are timed by
    ``rows_per_window``, which is :attr:`.Objective.mean_rows`. The global generator is seeded last:
    from here on only router noise draws from it.
    """
    has_slices = config.parallel.gradient_slices is not None
    zero = deepspeed_settings(config, mesh.world_size)
    here, precision = device(), config.train.precision
    if has_slices and here.type == "cuda":
        raise ConfigError(
            f"parallel.gradient_slices is {config.parallel.gradient_slices}, which plans by the "
            "host's clock, but ranks compute on GPUs; leave it out."
        )
    engine = open_engine(config.parallel.dense, mesh, has_queue=has_slices, deepspeed=zero)
    freeze(config, decoder)
    engine.place(decoder, here)
    masters = apply_precision(decoder, precision, engine.own_masters(decoder))
    paths = place_experts(config, decoder, mesh)
    for router in decoder.routers():
        router.experts_changed()
    refill_averages(layer for _, layer in decoder.moe_layers())
    wrapped = engine.wrap(loss, decoder, torch_dtype(precision), here)
    copies = copy_experts(config, decoder, mesh, rows_per_window)
    pipelines = {kind: path for kind, path in paths.items() if isinstance(path, PipelinedPath)}
    slices = None
    if engine.queue is not None:
        slices = GradientSlices(engine.queue, list(pipelines.values()), mesh, here)
    seed_rank(config.seed, mesh.rank)
    return Parallel(engine, wrapped, masters, copies, pipelines, slices)


def freeze(config: RunConfig, decoder: Model) -> None:
    """Freeze what ``train.parameters`` excludes; add low-rank updates for ``lora``."""
    if config.train.parameters == "router":
        decoder.requires_grad_(False)
        for router in decoder.routers():
            router.requires_grad_(True)
    elif config.lora is not None:
        lora = config.lora
        assert isinstance(decoder, Decoder), "config.py refuses others"
        add_lora(decoder, lora.rank, lora.alpha, lora.targets, config.seed, lora.mixture)


def place_experts(config: RunConfig, decoder: Model, mesh: Mesh) -> dict[PathKind, ExpertPath]:
    """Let MoE layers send tokens to experts on other ranks, if there are any.

    Returns the paths to choose from; the layers have the first one.
    """
    moe, parallel = decoder.config.moe, config.parallel
    if mesh.ep_size * mesh.expert_tp_size == 1 or moe is None:
        return {}
    degrees = None
    if parallel.chunks != "auto":  # else layer_schedule.py sets them
        degrees = Degrees(parallel.chunks, parallel.backward_chunks or parallel.chunks)
    paths = {
        kind: open_path(
            kind,
            degrees,
            moe.num_experts,
            mesh,
            _ranks_per_node(config),
            parallel.timeout_s,
            has_copies=parallel.copies is not None,
            has_lanes=parallel.gradient_slices is not None,
            capacity=_capacity(config, moe, mesh) if kind == "padded" else None,
        )
        for kind in _kinds(config)
    }
    for _, layer in decoder.moe_layers():
        layer.path = next(iter(paths.values()))
    return paths


def _kinds(config: RunConfig) -> tuple[PathKind, ...]:
    """Return the paths that a run chooses from."""
    if config.parallel.path != "auto":
        return (config.parallel.path,)
    has_nodes = 1 < _ranks_per_node(config) < config.parallel.ep
    return ("all_to_all", "hierarchical") if has_nodes else ("all_to_all",)


def _capacity(config: RunConfig, moe: MoEConfig, mesh: Mesh) -> int | None:
    """Return the most rows of a micro-batch that a rank sends to an expert, if there is a limit."""
    train = config.train
    rows = moe.router.most_rows(train.sequence_length, moe.num_experts)
    sequences = train.batch_sequences // (train.accumulation * mesh.dp_size)
    return None if rows is None else sequences * rows


def copy_experts(
    config: RunConfig, decoder: Model, mesh: Mesh, rows_per_window: int
) -> MaterializedExperts | None:
    """Let busy experts have copies on more ranks, if the run says so."""
    parallel = config.parallel
    if parallel.copies is None or mesh.ep_group is None:
        return None
    _, first = decoder.moe_layers()[0]
    assert isinstance(first.path, PipelinedPath), "copies need levels"
    levels = first.path.levels
    copies = open_copies(
        [layer for _, layer in decoder.moe_layers()],
        mesh,
        Topology(mesh.ep_size, min(_ranks_per_node(config), mesh.ep_size)),
        CopyOptions(
            parallel.copies.max_bytes,
            parallel.copies.experts,
            parallel.copies.rematerialize,
            parallel.copies.window,
        ),
        parallel.timeout_s,
    )
    if parallel.copies.when == "faster":
        shape = layer_shape(config, decoder, mesh, rows_per_window)
        steps = config.train.accumulation
        copies.costs = measure_copies(copies, shape, levels, mesh, device(), steps)
    return copies


def _ranks_per_node(config: RunConfig) -> int:
    given = config.parallel.ranks_per_node
    return given or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
