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
from ...config.model import MoEConfig
from ..expert_layouts import ExpertViews, GetPart, Shapes, plain
from ..mxfp4 import GROUP_BYTES, GROUP_SIZE, decode
from ..shards import TensorPlan
from ..tensor_files import TensorFiles


class GptOssExperts:
    """See the module."""

    def tensors(self, files: TensorFiles, moe: MoEConfig, d_model: int, layer: int) -> Shapes:
        """Yield name and shape of every tensor that the experts of ``layer`` need."""
        if files.packed is not None:
            raise ModelFileError(
                "config.json says that gpt_oss's experts are in the compressed-tensors format; "
                "only MXFP4 and plain types are read in this family."
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

    def reads(
        self, files: TensorFiles, layer: int, expert: int, views: ExpertViews
    ) -> list[Callable[[], None]]:
        """Return calls that fill ``views``, each a part of the work."""
        gate_up, down = _name(layer, "gate_up"), _name(layer, "down")
        calls: list[Callable[[], None]] = []
        if "gate" in views:
            calls.append(partial(_read_gate_up, files, gate_up, expert, views))
        if "down" in views:
            calls.append(partial(_read_matrix, files, down, expert, plain(views, "down")))
        if "gate_bias" in views:
            calls.append(partial(_read_gate_up_bias, files, gate_up, expert, views))
        if "down_bias" in views:
            calls.append(
                partial(files.read_part, f"{down}_bias", expert, plain(views, "down_bias"))
            )
        return calls

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


def _read_gate_up(files: TensorFiles, name: str, expert: int, views: ExpertViews) -> None:
    gate, up = plain(views, "gate"), plain(views, "up")
    both = torch.empty(2 * len(gate), gate.shape[1], dtype=gate.dtype)
    _read_matrix(files, name, expert, both)
    gate.copy_(both[::2])
    up.copy_(both[1::2])


def _read_gate_up_bias(files: TensorFiles, name: str, expert: int, views: ExpertViews) -> None:
    gate, up = plain(views, "gate_bias"), plain(views, "up_bias")
    both = torch.empty(2 * len(gate), dtype=gate.dtype)
    files.read_part(f"{name}_bias", expert, both)
    gate.copy_(both[::2])
    up.copy_(both[1::2])


def _read_matrix(files: TensorFiles, name: str, expert: int, out_QP: Tensor) -> None:
    """Fill a matrix of Q outputs and P inputs."""
    rows, width = out_QP.shape
    if f"{name}_blocks" not in files:
        transposed_PQ = torch.empty(width, rows, dtype=files.entry(name).dtype)
        files.read_part(name, expert, transposed_PQ)
        out_QP.copy_(transposed_PQ.T)
        return
    groups = width // GROUP_SIZE
    blocks = torch.empty(rows, groups, GROUP_BYTES, dtype=torch.uint8)
    scales = torch.empty(rows, groups, dtype=torch.uint8)
    files.read_part(f"{name}_blocks", expert, blocks)
    files.read_part(f"{name}_scales", expert, scales)
    decode(blocks, scales, out_QP)
