"""How folders lay out the routed experts' matrices, and how one expert is read and written.

E experts, D model width, F expert width.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.values.few_bits import MatrixView
from ...kernels.values.quantized_weights import SlotView
from ..config.moe import MoEConfig
from .compressed_tensors import PackedFormat, packed_name, packed_pieces
from .extents import Piece
from .shards import TensorPlan
from .tensor_files import TensorFiles

ExpertViews = Mapping[str, Tensor | MatrixView]
"""An expert's writable ``gate``, ``up`` ``[F, D]`` and ``down`` ``[D, F]`` matrices, and with
biases ``gate_bias``, ``up_bias`` ``[F]`` and ``down_bias`` ``[D]``. Experts whose activation has no
gate have neither ``gate`` nor ``gate_bias``. A matrix in few bits is a :class:`MatrixView` of its
format; only a folder of the same format can fill it."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]
GetPart = Callable[[int, str], Tensor]
"""Maps an expert's id and a part's name, as in :data:`ExpertViews`, to the tensor."""


def plain(views: ExpertViews, part: str) -> Tensor:
    """Return a part that is not quantized; tensors of many experts never are."""
    view = views[part]
    assert isinstance(view, Tensor), f"{part} is quantized"
    return view


def part_shapes(moe: MoEConfig, d_model: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an expert's parts."""
    wide, narrow = (moe.d_expert, d_model), (d_model, moe.d_expert)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(moe.fc1_parts, wide)
    shapes["down"] = narrow
    if moe.expert_bias:
        shapes |= {f"{part}_bias": shape[:1] for part, shape in shapes.items()}
    return shapes


class ExpertLayout(Protocol):
    """Where the experts of a layer are in a folder."""

    def tensors(self, files: TensorFiles, moe: MoEConfig, d_model: int, layer: int) -> Shapes:
        """Yield name and shape of every tensor that the experts of ``layer`` need."""
        ...

    def pieces(
        self, files: TensorFiles, layer: int, expert: int, views: ExpertViews
    ) -> list[Piece]:
        """Return what an expert consists of and where each part goes.

        ``views`` may have only some parts, but gate and up always together.
        """
        ...

    def plans(
        self, moe: MoEConfig, d_model: int, layer: int, dtype: torch.dtype, get: GetPart
    ) -> Iterator[TensorPlan]:
        """Yield how the experts of ``layer`` are written."""
        ...


class SeparateExperts:
    """A tensor for each matrix of each expert, ``<prefix>.3.gate_proj.weight``.

    Also reads the fused layout that transformers 5 uses in memory: all experts in one
    ``gate_up_proj`` ``[E, 2F, D]`` (gate rows first) and one ``down_proj`` ``[E, D, F]``.
    """

    def __init__(
        self,
        prefix: str = "mlp.experts",
        gate: str = "gate_proj",
        up: str = "up_proj",
        down: str = "down_proj",
    ) -> None:
        self._prefix = prefix
        self._names = {"gate": gate, "up": up, "down": down}

    def tensors(self, files: TensorFiles, moe: MoEConfig, d_model: int, layer: int) -> Shapes:
        """Yield name and shape of every tensor that the experts of ``layer`` need."""
        if self._is_fused(files, layer) and "gate" in moe.fc1_parts:
            num_experts, d_expert = moe.num_experts, moe.d_expert
            yield _fused_name(layer, "gate_up"), (num_experts, 2 * d_expert, d_model)
            yield _fused_name(layer, "down"), (num_experts, d_model, d_expert)
            return
        shapes = part_shapes(moe, d_model)
        for expert in range(moe.num_experts):
            for part, shape in shapes.items():
                name = self.name(layer, expert, part)
                if files.packed is None or len(shape) == 1:
                    yield name, shape
                    continue
                for stored, (_, stored_shape) in files.packed.of(name).stored(name, *shape).items():
                    yield stored, stored_shape

    def pieces(
        self, files: TensorFiles, layer: int, expert: int, views: ExpertViews
    ) -> list[Piece]:
        """Return what an expert consists of and where each part goes."""
        if self._is_fused(files, layer):
            return list(_fused_pieces(files, layer, expert, views))
        return [
            piece
            for part, view in views.items()
            for piece in _pieces_of(files, self.name(layer, expert, part), view)
        ]

    def plans(
        self, moe: MoEConfig, d_model: int, layer: int, dtype: torch.dtype, get: GetPart
    ) -> Iterator[TensorPlan]:
        """Yield how the experts of ``layer`` are written: always as separate tensors."""
        shapes = part_shapes(moe, d_model)
        for expert in range(moe.num_experts):
            for part, shape in shapes.items():
                name = self.name(layer, expert, part)
                parts = partial(_one, get, expert, part, dtype)
                yield TensorPlan(name, dtype, shape, parts, layer, expert)

    def name(self, layer: int, expert: int, part: str) -> str:
        """Return the name of one part of one expert."""
        matrix, _, bias = part.partition("_")
        leaf = bias or "weight"
        return f"model.layers.{layer}.{self._prefix}.{expert}.{self._names[matrix]}.{leaf}"

    def _is_fused(self, files: TensorFiles, layer: int) -> bool:
        is_separate = files.packed is not None or self.name(layer, 0, "up") in files
        return not is_separate and _fused_name(layer, "gate_up") in files


def _pieces_of(files: TensorFiles, name: str, view: Tensor | MatrixView) -> list[Piece]:
    if files.packed is not None and packed_name(name) in files:
        packed = files.packed.of(name)
        if not isinstance(packed, PackedFormat):
            return packed.pieces(files.place, name, view)
        assert isinstance(view, SlotView | Tensor), f"{name} is not sparse"
        return packed_pieces(files.place, packed, name, view)
    assert isinstance(view, Tensor), f"{name} is not quantized"
    return [Piece((files.place(name, tuple(view.shape)),), view)]


def _fused_name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{part}_proj"


def _fused_pieces(
    files: TensorFiles, layer: int, expert: int, views: ExpertViews
) -> Iterator[Piece]:
    if "gate" in views:
        gate, up = plain(views, "gate"), plain(views, "up")
        shape = (2 * gate.shape[0], gate.shape[1])
        both = files.place_of_part(_fused_name(layer, "gate_up"), expert, shape)
        for place, view in zip(both.halves(), (gate, up), strict=True):
            yield Piece((place,), view)
    if "down" in views:
        down = plain(views, "down")
        name = _fused_name(layer, "down")
        yield Piece((files.place_of_part(name, expert, tuple(down.shape)),), down)


def _one(get: GetPart, expert: int, part: str, dtype: torch.dtype) -> Iterator[Tensor]:
    yield get(expert, part).to(dtype)
