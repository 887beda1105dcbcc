"""Group-sparse experts in 4 bits: our own layout, which transformers and vLLM do not read.

A matrix ``X.weight`` ``[Q, P]`` of a routed expert is stored as ``X.weight_packed``, uint8
``[Q, 16 N]``; ``X.weight_columns`` ``[Q, N]``, uint8, or int16 where P is more than 8192; and
``X.weight_scale``, bf16 ``[Q, N]``. kernels/values/group_sparse.py says what they hold.
``quantization_config`` in config.json says how many groups rows keep.

Q outputs and P inputs of a matrix, N groups that a row keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, ModelFileError
from ...kernels.values.few_bits import MatrixView
from ...kernels.values.group_sparse import (
    GROUP,
    GROUP_BYTES,
    GroupSparseMatrices,
    GroupSparseView,
    check_columns,
    column_type,
    empty_group_sparse,
    widened,
)
from ...kernels.values.sparsify import kept_groups
from ..config.model import LayersConfig
from .compressed_tensors import PackedFormat
from .expert_hashes import DamagedExpertError
from .extents import Piece, Place
from .two_of_four_format import TwoOfFourFormat

METHOD = "moeyard-group-sparse"
NAME = "int4_sparse"
"""What convert's ``dtype`` and the price call it."""
MOST_SPARSITY = 0.9


@dataclass(frozen=True, slots=True)
class GroupSparseFormat:
    """How the routed experts of a model are pruned."""

    sparsity: float
    """Share of a row's groups that are pruned, rounded to whole groups; at least one stays."""

    def of(self, name: str) -> "GroupSparseFormat":
        """Return this format: every pruned matrix has it."""
        return self

    def kept(self, name: str, width: int) -> int:
        """Return N for a matrix of ``width`` inputs; :class:`ModelFileError` if groups do not
        divide them."""
        if width % GROUP:
            raise ModelFileError(
                f"{name} has {width} inputs, which groups of {GROUP} do not divide; "
                "copy the folder again."
            )
        return kept_groups(width, self.sparsity)

    def stored(
        self, name: str, rows: int, width: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return names, types and shapes of what is stored for ``name``, a ``[rows, width]``."""
        kept = self.kept(name, width)
        values, columns, scales = names_of(name)
        return {
            values: (torch.uint8, (rows, kept * GROUP_BYTES)),
            columns: (column_type(width), (rows, kept)),
            scales: (torch.bfloat16, (rows, kept)),
        }

    def empty(self, num_slots: int, rows: int, width: int) -> GroupSparseMatrices:
        """Allocate matrices on the CPU."""
        kept = self.kept("fc1 or fc2", width)
        return empty_group_sparse(num_slots, rows, width, kept, torch.device("cpu"))

    def pieces(
        self,
        place: Callable[[str, tuple[int, ...]], Place],
        name: str,
        view: MatrixView | Tensor,
    ) -> list[Piece]:
        """Return what matrix ``name`` consists of, to fill few bits or a plain matrix.

        ``place`` finds a stored tensor of a name and a shape. Columns are checked before anything
        computes with them, so that damage never becomes an access outside a row.
        """
        assert isinstance(view, GroupSparseView | Tensor), f"{name} is group-sparse"
        rows, width = view.shape if isinstance(view, Tensor) else (len(view.scales_QN), view.width)
        stored = self.stored(name, rows, width)
        places = [place(part, shape) for part, (_, shape) in stored.items()]
        if isinstance(view, Tensor):
            return [Piece(tuple(places), partial(_put_widened, name, view))]
        check = partial(_check, name, view)
        return [
            Piece((found,), part, check if part is view.columns_QN else None)
            for found, part in zip(places, view, strict=True)
        ]


StoredFormat = PackedFormat | GroupSparseFormat | TwoOfFourFormat
"""How the matrices of a folder are stored in fewer bytes."""


def choose_sparsity(config: LayersConfig, sparsity: float) -> GroupSparseFormat:
    """Return the format for a model; :class:`ConfigError` where that is impossible."""
    if not 0 <= sparsity <= MOST_SPARSITY:
        raise ConfigError(
            f"sparsity is {sparsity}; use a share of the weights to prune from 0 to "
            f"{MOST_SPARSITY}, such as 0.5."
        )
    if config.moe is None:
        raise ConfigError(f"dtype is {NAME}, but the model has no experts; use bf16 or fp32.")
    widths = (config.d_model, config.moe.d_expert)
    if any(width % GROUP for width in widths):
        raise ConfigError(
            f"dtype is {NAME}, but the experts' widths are {widths[0]} and {widths[1]}, which must "
            f"be multiples of {GROUP}; use bf16 or fp32."
        )
    return GroupSparseFormat(sparsity)


def group_sparse_config(packed: GroupSparseFormat) -> dict[str, Any]:
    """Return ``quantization_config`` for config.json."""
    return {"quant_method": METHOD, "bits": 4, "group_size": GROUP, "sparsity": packed.sparsity}


def read_group_sparse_config(values: dict[str, Any]) -> GroupSparseFormat:
    """Read ``quantization_config``; raises :class:`ModelFileError` for values that are not ours."""
    for key, known in (("bits", 4), ("group_size", GROUP)):
        if values.get(key) != known:
            raise ModelFileError(
                f"config.json has quantization_config.{key} = {values.get(key)!r}; only {known} "
                "is read. Convert the model again."
            )
    sparsity = values.get("sparsity")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity <= MOST_SPARSITY:
        raise ModelFileError(
            f"config.json has quantization_config.sparsity = {sparsity!r}; it must be a number "
            f"from 0 to {MOST_SPARSITY}. Copy the folder again."
        )
    return GroupSparseFormat(float(sparsity))


def names_of(name: str) -> tuple[str, str, str]:
    """Return the names of the stored tensors of a matrix: values, columns and scales."""
    assert name.endswith("weight"), f"{name} is not the weight of a module"
    return f"{name}_packed", f"{name}_columns", f"{name}_scale"


def _check(name: str, view: GroupSparseView) -> None:
    try:
        check_columns(view.columns_QN, view.width)
    except ValueError as error:
        raise DamagedExpertError(
            f"{name} is damaged: {error}; copy the folder again, or convert the model again"
        ) from None


def _put_widened(
    name: str, out_QP: Tensor, values_QB: Tensor, columns_QN: Tensor, scales_QN: Tensor
) -> None:
    view = GroupSparseView(values_QB, columns_QN, scales_QN, out_QP.shape[1])
    _check(name, view)
    out_QP.copy_(widened(view, out_QP.dtype))
