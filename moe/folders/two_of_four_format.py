"""2:4 experts in bf16: our own layout, which transformers and vLLM do not read.

A matrix ``X.weight`` ``[Q, P]`` of a routed expert is stored as ``X.weight_packed``, bf16
``[Q, P / 2]``, and ``X.weight_places``, uint8 ``[Q, P / 8]``. kernels/values/two_of_four.py says
what they hold.

Q outputs and P inputs of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, ModelFileError
from ...kernels.values.few_bits import MatrixView
from ...kernels.values.two_of_four import (
    PATTERN,
    UNIT,
    TwoOfFourMatrices,
    TwoOfFourView,
    check_places,
    empty_two_of_four,
    pack,
    unpacked,
)
from ..config.model import LayersConfig
from .expert_hashes import DamagedExpertError
from .extents import Piece, Place
from .shards import TensorPlan

METHOD = "moeyard-n-of-m"
NAME = str(PATTERN)
"""What convert's ``dtype`` calls it."""


@dataclass(frozen=True, slots=True)
class TwoOfFourFormat:
    """All matrices of routed experts are 2:4 in bf16."""

    def of(self, name: str) -> "TwoOfFourFormat":
        """Return this format: every matrix of an expert has it."""
        return self

    def stored(
        self, name: str, rows: int, width: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return names, types and shapes of what is stored for ``name``, a ``[rows, width]``."""
        if width % UNIT:
            raise ModelFileError(
                f"{name} has {width} inputs, which {UNIT} does not divide; copy the folder again."
            )
        values, places = names_of(name)
        return {
            values: (torch.bfloat16, (rows, width // 2)),
            places: (torch.uint8, (rows, width // UNIT)),
        }

    def empty(self, num_slots: int, rows: int, width: int) -> TwoOfFourMatrices:
        """Allocate matrices on the CPU."""
        return empty_two_of_four(num_slots, rows, width, torch.device("cpu"))

    def pieces(
        self,
        place: Callable[[str, tuple[int, ...]], Place],
        name: str,
        view: MatrixView | Tensor,
    ) -> list[Piece]:
        """Return what matrix ``name`` consists of, to fill a packed or a plain matrix.

        ``place`` finds a stored tensor of a name and a shape.
        """
        assert isinstance(view, TwoOfFourView | Tensor), f"{name} is 2:4"
        rows, width = view.shape
        stored = self.stored(name, rows, width)
        places = [place(part, shape) for part, (_, shape) in stored.items()]
        if isinstance(view, Tensor):
            return [Piece(tuple(places), partial(_put_unpacked, name, view))]
        check = partial(_check, name, view.places_QB)
        return [
            Piece((found,), part, check if part is view.places_QB else None)
            for found, part in zip(places, view, strict=True)
        ]


def choose_two_of_four(config: LayersConfig) -> TwoOfFourFormat:
    """Return the format for a model; :class:`ConfigError` where that is impossible."""
    if config.moe is None:
        raise ConfigError(f"dtype is {NAME}, but the model has no experts; use bf16 or fp32.")
    widths = (config.d_model, config.moe.d_expert)
    if any(width % UNIT for width in widths):
        raise ConfigError(
            f"dtype is {NAME}, but the experts' widths are {widths[0]} and {widths[1]}, which must "
            f"be multiples of {UNIT}; use bf16 or fp32."
        )
    return TwoOfFourFormat()


def two_of_four_config() -> dict[str, Any]:
    """Return ``quantization_config`` for config.json."""
    return {"quant_method": METHOD, "n": PATTERN.n, "m": PATTERN.m, "dtype": "bfloat16"}


def read_two_of_four_config(values: dict[str, Any]) -> TwoOfFourFormat:
    """Read ``quantization_config``; raises :class:`ModelFileError` for values that are not ours."""
    for key, known in two_of_four_config().items():
        if values.get(key) != known:
            raise ModelFileError(
                f"config.json has quantization_config.{key} = {values.get(key)!r}; only {known!r} "
                "is read. Convert the model again."
            )
    return TwoOfFourFormat()


def names_of(name: str) -> tuple[str, str]:
    """Return the names of the stored tensors of a matrix: values and places."""
    assert name.endswith("weight"), f"{name} is not the weight of a module"
    return f"{name}_packed", f"{name}_places"


def pack_plans(plans: Iterable[TensorPlan], packed: TwoOfFourFormat) -> list[TensorPlan]:
    """Return the plans of a folder in which the experts' matrices are packed."""
    found: list[TensorPlan] = []
    for plan in plans:
        is_matrix = plan.expert is not None and len(plan.shape) == 2
        found += _packed(_PackedMatrix(plan), packed) if is_matrix else [plan]
    return found


class _PackedMatrix:
    """Packs a matrix when its first tensor is read, and frees each tensor after that."""

    def __init__(self, plan: TensorPlan) -> None:
        self.plan = plan
        self._left: dict[str, Tensor] = {}

    def take(self, name: str) -> list[Tensor]:
        if not self._left:
            (weight_QP,) = self.plan.parts()
            try:
                view = pack(weight_QP)
            except ValueError as error:
                raise ConfigError(
                    f"dtype is {NAME}, but {self.plan.name} {error}; train with "
                    "train.sparse_experts, or use another dtype."
                ) from None
            self._left = dict(zip(names_of(self.plan.name), view, strict=True))
        return [self._left.pop(name)]


def _packed(matrix: _PackedMatrix, packed: TwoOfFourFormat) -> Iterator[TensorPlan]:
    plan = matrix.plan
    for name, (dtype, shape) in packed.stored(plan.name, *plan.shape).items():
        yield TensorPlan(name, dtype, shape, partial(matrix.take, name), plan.layer, plan.expert)


def _check(name: str, places_QB: Tensor) -> None:
    try:
        check_places(places_QB)
    except ValueError as error:
        raise DamagedExpertError(
            f"{name} is damaged: {error}; copy the folder again, or convert the model again"
        ) from None


def _put_unpacked(name: str, out_QP: Tensor, values_QV: Tensor, places_QB: Tensor) -> None:
    _check(name, places_QB)
    out_QP.copy_(unpacked(TwoOfFourView(values_QV, places_QB), out_QP.dtype))
