"""The tensors of a new folder, each with its source."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..config.model import LayersConfig
from .compressed_tensors import PackedFormat
from .expert_layouts import part_shapes
from .families.family import Family
from .folder import ModelFolder
from .shards import TensorPlan
from .tensor_names import dense_tensors, is_router
from .write_few_bits import pack

TOGETHER = (("gate", "up"), ("down",), ("gate_bias", "up_bias"), ("down_bias",))
"""Parts of an expert that are next to each other in folders, and so are read together."""


class WeightSource(Protocol):
    """Where weights come from, one tensor at a time."""

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor of the decoder outside the experts."""
        ...

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a part of an expert, as ``ExpertViews`` names them."""
        ...


class FolderWeights:
    """The weights of an open folder; quantized experts are dequantized."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype) -> None:
        self._folder = folder
        self._dtype = dtype
        moe = folder.config.moe
        self._shapes = {} if moe is None else part_shapes(moe, folder.config.d_model)
        self._expert = (-1, -1)
        self._checked: set[tuple[int, int]] = set()
        self._parts: dict[str, Tensor] = {}

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor of the decoder outside the experts, in the type it is stored in."""
        dtype, shape = self._folder.stored(parameter)
        tensor = torch.empty(shape, dtype=dtype)
        self._folder.read_into(parameter, tensor)
        return tensor

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a part of an expert; parts read with it are kept until the next expert.

        The first time, all of the expert is compared with its hash, if the folder has one.
        """
        if (layer, expert) not in self._checked:
            self._folder.check_expert(layer, expert)
            self._checked.add((layer, expert))
        if self._expert != (layer, expert) or part not in self._parts:
            group = next(group for group in TOGETHER if part in group)
            names = [name for name in group if name in self._shapes]
            views = {name: torch.empty(self._shapes[name], dtype=self._dtype) for name in names}
            self._folder.read_expert(layer, expert, views)
            self._expert, self._parts = (layer, expert), views
        return self._parts[part]


def plan_weights(
    config: LayersConfig,
    family: Family,
    source: WeightSource,
    dtype: torch.dtype,
    router_dtype: torch.dtype,
    packed: PackedFormat | Mapping[tuple[int, int], PackedFormat] | None = None,
) -> list[TensorPlan]:
    """Return every tensor of a folder of ``family``, floating ones in ``dtype``.

    Routers have a separate type, and integers keep theirs. ``packed`` is how the experts' matrices
    are quantized, by layer and expert where they differ; None = not at all.
    """
    plans, family = [], family.bind(family, config)
    for parameter, like in dense_tensors(config):
        wanted = router_dtype if is_router(parameter) else dtype
        kept = wanted if like.is_floating_point() else like.dtype
        parts = partial(_one, source, parameter, kept)
        plans.append(TensorPlan(family.tensor_name(parameter), kept, tuple(like.shape), parts))
    moe = config.moe
    for layer in config.moe_layers:
        assert moe is not None, "only MoE models have MoE layers"
        get: Callable[[int, str], Tensor] = partial(source.expert_part, layer)
        for plan in family.experts.plans(moe, config.d_model, layer, dtype, get):
            if packed is None or len(plan.shape) != 2:
                plans.append(plan)
            else:
                plans += pack(plan, _format_of(plan, packed))
    return plans


def _format_of(
    plan: TensorPlan, packed: PackedFormat | Mapping[tuple[int, int], PackedFormat]
) -> PackedFormat:
    if isinstance(packed, PackedFormat):
        return packed
    assert plan.layer is not None and plan.expert is not None, "experts are in one tensor"
    return packed[plan.layer, plan.expert]


def _one(source: WeightSource, parameter: str, dtype: torch.dtype) -> Iterator[Tensor]:
    yield source.dense(parameter).to(dtype)
