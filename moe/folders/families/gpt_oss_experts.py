"""gpt-oss's experts: all of a layer in one tensor, gate and up interleaved, in bf16 or MXFP4.

E experts, D model width, F expert width, G groups of 32 inputs.

In bf16 matrices are transposed (``x @ W``): ``gate_up_proj`` ``[E, D, 2F]``, ``down_proj``
``[E, F, D]``. In MXFP4 they are not: ``gate_up_proj_blocks`` ``[E, 2F, G, 16]`` with
``gate_up_proj_scales`` ``[E, 2F, G]``, and the same of ``down_proj``, D rows of F inputs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ....errors import ModelFileError
from ...config.moe import MoEConfig
from ..expert_layouts import ExpertViews, GetPart, Shapes, plain
from ..extents import Piece
from ..mxfp4 import GROUP_BYTES, GROUP_SIZE, decode
from ..shards import TensorPlan
from ..tensor_files import TensorFiles


class GptOssExperts:
    """See the module."""

    def tensors(self, files: TensorFiles, moe: MoEConfig, d_model: int, layer: int) -> Shapes:
        """Yield name and shape of every tensor that the experts of ``layer`` need."""
        if files.packed is not None:
            raise ModelFileError(
                "config.json says that gpt_oss's experts are in the compressed-tensors format, or "
                "group-sparse; only MXFP4 and plain types are read in this family."
            )
        num_experts, d_expert = moe.num_experts, moe.d_expert
        for part, rows, width in (("gate_up", 2 * d_expert, d_model), ("down", d_model, d_expert)):
            name = _name(layer, part)
            yield f"{name}_bias", (num_experts, rows)
            if f"{name}_blocks" not in files:
                yield name, (num_experts, width, rows)
                continue
            if width % GROUP_SIZE:
                raise ModelFileError(
                    f"{name}_blocks are groups of {GROUP_SIZE}, which do not divide the "
                    f"{width} inputs that config.json asks for; copy the folder again."
                )
            groups = width // GROUP_SIZE
            yield f"{name}_blocks", (num_experts, rows, groups, GROUP_BYTES)
            yield f"{name}_scales", (num_experts, rows, groups)

    def pieces(
        self, files: TensorFiles, layer: int, expert: int, views: ExpertViews
    ) -> list[Piece]:
        """Return what an expert consists of and where each part goes."""
        gate_up, down = _name(layer, "gate_up"), _name(layer, "down")
        pieces: list[Piece] = []
        if "gate" in views:
            both = plain(views, "gate"), plain(views, "up")
            pieces.append(_matrix(files, gate_up, expert, both))
        if "gate_bias" in views:
            gate_bias, up_bias = plain(views, "gate_bias"), plain(views, "up_bias")
            place = files.place_of_part(f"{gate_up}_bias", expert, (2 * len(gate_bias),))
            pieces.append(Piece((place,), partial(_put_rows, (gate_bias, up_bias))))
        if "down" in views:
            pieces.append(_matrix(files, down, expert, (plain(views, "down"),)))
        if "down_bias" in views:
            bias = plain(views, "down_bias")
            place = files.place_of_part(f"{down}_bias", expert, tuple(bias.shape))
            pieces.append(Piece((place,), bias))
        return pieces

    def plans(
        self, moe: MoEConfig, d_model: int, layer: int, dtype: torch.dtype, get: GetPart
    ) -> Iterator[TensorPlan]:
        """Yield how the experts of ``layer`` are written: in plain types, an expert at a time."""
        num_experts, width = moe.num_experts, 2 * moe.d_expert

        def each(make: Callable[[int], Tensor]) -> Callable[[], Iterator[Tensor]]:
            return lambda: (make(e).to(dtype).contiguous().unsqueeze(0) for e in range(num_experts))

        def gate_up(suffix: str) -> Callable[[int], Tensor]:
            return lambda e: torch.stack(
                [get(e, f"gate{suffix}"), get(e, f"up{suffix}")], dim=1
            ).flatten(0, 1)

        def plan(name: str, shape: tuple[int, ...], make: Callable[[int], Tensor]) -> TensorPlan:
            return TensorPlan(name, dtype, (num_experts, *shape), each(make), layer)

        name, down = _name(layer, "gate_up"), _name(layer, "down")
        matrix, bias = gate_up(""), gate_up("_bias")
        yield plan(name, (d_model, width), lambda e: matrix(e).T)
        yield plan(f"{name}_bias", (width,), bias)
        yield plan(down, (moe.d_expert, d_model), lambda e: get(e, "down").T)
        yield plan(f"{down}_bias", (d_model,), lambda e: get(e, "down_bias"))


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{part}_proj"


def _matrix(files: TensorFiles, name: str, expert: int, outs: tuple[Tensor, ...]) -> Piece:
    """Return the piece of a matrix whose rows go to ``outs`` ``[Q, P]`` in turn."""
    rows, width = len(outs) * outs[0].shape[0], outs[0].shape[1]
    if f"{name}_blocks" not in files:
        place = files.place_of_part(name, expert, (width, rows))
        return Piece((place,), partial(_put_transposed, outs))
    groups = width // GROUP_SIZE
    blocks = files.place_of_part(f"{name}_blocks", expert, (rows, groups, GROUP_BYTES))
    scales = files.place_of_part(f"{name}_scales", expert, (rows, groups))
    return Piece((blocks, scales), partial(_put_decoded, outs))


def _put_decoded(outs: tuple[Tensor, ...], blocks_QGB: Tensor, scales_QG: Tensor) -> None:
    first = outs[0]
    if len(outs) == 1:
        decode(blocks_QGB, scales_QG, first)
        return
    both = torch.empty(len(blocks_QGB), first.shape[1], dtype=first.dtype)
    decode(blocks_QGB, scales_QG, both)
    _put_rows(outs, both)


def _put_transposed(outs: tuple[Tensor, ...], stored_PQ: Tensor) -> None:
    _put_rows(outs, stored_PQ.T)


def _put_rows(outs: tuple[Tensor, ...], stored: Tensor) -> None:
    """Put the first row into the first tensor, the second into the second, and so on in turn."""
    for index, out in enumerate(outs):
        out.copy_(stored[index :: len(outs)])
