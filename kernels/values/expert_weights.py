"""The weights of the experts that are here, addressed through a slot table.

S slots, E experts, F expert width, D model width, H rows of fc1: 2F with a gate, F without.
"""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .activation import Activation, fc1_parts, fc1_rows
from .main_grads import MainGrads
from .memory import prefer_huge_pages

ALIGNMENT_BYTES = 64
"""Every slot starts on a cache line: with less alignment BLAS picks other code, which rounds
differently."""
FIRST_ALIGNMENT_BYTES = 4096
"""The first slot starts on a page, and then so do those of most models: direct I/O wants that."""


Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""fc1, fc2 and their biases; None for a missing bias."""


class SlotTable:
    """Which slot holds which expert; the base of every layout of the weights."""

    __slots__ = ()
    slot_of_E: Sequence[int] | None
    activation: Activation
    fc1_bias_SH: Tensor | None
    fc2_bias_SD: Tensor | None

    @property
    def num_slots(self) -> int:
        """S."""
        raise NotImplementedError

    @property
    def num_experts(self) -> int:
        """E: how many experts the routing may name."""
        return self.num_slots if self.slot_of_E is None else len(self.slot_of_E)

    @property
    def consecutive(self) -> range | None:
        """The experts of slots 0, 1, 2, ... if they are consecutive, else None."""
        if self.slot_of_E is None:
            return range(self.num_slots)
        if 0 not in self.slot_of_E:
            return None
        first = self.slot_of_E.index(0)
        end = first + self.num_slots
        is_in_order = list(self.slot_of_E[first:end]) == list(range(self.num_slots))
        return range(first, end) if is_in_order else None

    def slot(self, expert: int) -> int:
        """Return the slot of ``expert``, -1 when it is not here."""
        return expert if self.slot_of_E is None else self.slot_of_E[expert]

    @property
    def bias_parts(self) -> tuple[Tensor, ...]:
        """The biases of all slots, of fc1 and fc2; empty without biases."""
        return tuple(b for b in (self.fc1_bias_SH, self.fc2_bias_SD) if b is not None)

    def biases(self, slot: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return the biases of a slot, ``[H]`` and ``[D]``, in ``dtype``; None without any."""
        if self.fc1_bias_SH is None or self.fc2_bias_SD is None:
            return None, None
        return self.fc1_bias_SH[slot].to(dtype), self.fc2_bias_SD[slot].to(dtype)

    def bias_views(self, slot: int) -> dict[str, Tensor]:
        """Return the writable biases of a slot by part; empty without biases."""
        if self.fc1_bias_SH is None or self.fc2_bias_SD is None:
            return {}
        views = self.fc1_views(self.fc1_bias_SH[slot])
        biases = {f"{part}_bias": view for part, view in views.items()}
        return biases | {"down_bias": self.fc2_bias_SD[slot]}

    def fc1_views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return a slot's rows of fc1, or of its bias, by part: gate and up, or up alone."""
        parts = fc1_parts(self.activation)
        return dict(zip(parts, rows.chunk(len(parts)), strict=True))


def check_slots(experts: SlotTable) -> None:
    """Raise ``ValueError`` for a table that names slots that do not exist."""
    table = experts.slot_of_E
    if table and not -1 <= min(table) <= max(table) < experts.num_slots:
        wrong = next(slot for slot in table if not -1 <= slot < experts.num_slots)
        raise ValueError(
            f"slot_of_E names slot {wrong}, but slots go from 0 to {experts.num_slots - 1}; use -1 "
            "for experts that are not here."
        )


def wanted_shapes(experts: SlotTable) -> str:
    """Say which shapes fc1 and fc2 must have."""
    rows = "2F" if len(fc1_parts(experts.activation)) == 2 else "F"
    return f"for {experts.activation} they must be [S, {rows}, D] and [S, D, F]"


def check_biases(
    fc1_bias_SH: Tensor | None,
    fc2_bias_SD: Tensor | None,
    fc1_shape: tuple[int, ...],
    fc2_shape: tuple[int, ...],
) -> None:
    """Raise ``ValueError`` unless both biases are None, or ``[S, H]`` and ``[S, D]``."""
    found = _shapes((fc1_bias_SH, fc2_bias_SD))
    if found not in ((None, None), (fc1_shape, fc2_shape)):
        raise ValueError(
            f"fc1_bias is {found[0]} and fc2_bias {found[1]}; give both, {fc1_shape} and "
            f"{fc2_shape}, or neither."
        )


def _shapes(tensors: Iterable[Tensor | None]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors)


@dataclass(frozen=True, slots=True)
class ExpertWeights(SlotTable):
    """Expert weights in the plain layout; quantized_weights.py has them in 8 and 4 bits.

    Resident experts are the case S = E with ``slot_of_E = None``. An expert cache gives the same
    kernels fewer slots and a table.
    """

    fc1_SHD: Tensor
    """``[S, 2F, D]``: F gate rows, then F up rows. ``[S, F, D]`` for activations without a gate."""
    fc2_SDF: Tensor
    """``[S, D, F]``."""
    _: KW_ONLY
    slot_of_E: Sequence[int] | None = None
    """Slot of each expert, -1 if it is not here; None if slot e holds expert e."""
    activation: Activation = "swiglu"
    main_grads: MainGrads | None = None
    """Where backward leaves the gradients of all parameters; None returns them."""
    fc1_bias_SH: Tensor | None = None
    """``[S, H]`` in fc1's type, added before the activation; None without biases."""
    fc2_bias_SD: Tensor | None = None
    """``[S, D]``, part of an expert's output and so multiplied by its routing weight."""

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor | None],
        *,
        slot_of_E: Sequence[int] | None = None,
        activation: Activation = "swiglu",
        main_grads: MainGrads | None = None,
    ) -> "ExpertWeights":
        """Return the weights made of fc1, fc2 and their biases, if any."""
        fc1, fc2, bias1, bias2 = parameters if len(parameters) == 4 else (*parameters, None, None)
        assert fc1 is not None and fc2 is not None, "experts have two matrices"
        return cls(
            fc1,
            fc2,
            slot_of_E=slot_of_E,
            activation=activation,
            main_grads=main_grads,
            fc1_bias_SH=bias1,
            fc2_bias_SD=bias2,
        )

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for shapes, types and slots that do not belong together."""
        fc1, fc2 = tuple(self.fc1_SHD.shape), tuple(self.fc2_SDF.shape)
        if len(fc2) != 3 or fc1 != (fc2[0], fc1_rows(fc2[2], self.activation), fc2[1]):
            raise ValueError(f"fc1 {fc1} and fc2 {fc2} do not fit; {wanted_shapes(self)}.")
        check_slots(self)
        check_biases(self.fc1_bias_SH, self.fc2_bias_SD, fc1[:2], fc2[:2])
        types = {str(part.dtype) for part in self.bias_parts}
        if types - {str(self.fc1_SHD.dtype)}:
            raise ValueError(
                f"The biases have type {' and '.join(sorted(types))}; they must have fc1's, "
                f"{self.fc1_SHD.dtype}."
            )
        if self.main_grads is not None:
            found, wanted = _shapes(self.main_grads.totals), _shapes(self.parameters)
            # Frozen parameters may go without: slices of experts have such a bias.
            trains = (part is not None and part.requires_grad for part in self.parameters)
            pairs = zip(found, wanted, trains, strict=True)
            if any(f != w and (f is not None or t) for f, w, t in pairs):
                raise ValueError(
                    f"main_grads are {found}; they must have the shapes of fc1, fc2 and their "
                    f"biases, {wanted}, or be None for frozen ones."
                )

    @property
    def num_slots(self) -> int:
        """S."""
        return self.fc1_SHD.shape[0]

    @property
    def d_model(self) -> int:
        """D."""
        return self.fc1_SHD.shape[2]

    @property
    def parameters(self) -> Parameters:
        """fc1, fc2 and their biases."""
        return self.fc1_SHD, self.fc2_SDF, self.fc1_bias_SH, self.fc2_bias_SD

    def matrices(self, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return fc1 ``[H, D]`` and fc2 ``[D, F]`` of a slot; they are in ``dtype`` already."""
        assert self.fc1_SHD.dtype == dtype, "the experts have another type"
        return self.fc1_SHD[slot], self.fc2_SDF[slot]

    def slot_views(self, slot: int) -> dict[str, Tensor]:
        """Return the writable parts of a slot: gate ``[F, D]``, up ``[F, D]``, down ``[D, F]``.

        With biases also gate_bias ``[F]``, up_bias ``[F]`` and down_bias ``[D]``. Without a gate
        there are neither gate nor gate_bias.
        """
        views = self.fc1_views(self.fc1_SHD[slot])
        return views | {"down": self.fc2_SDF[slot]} | self.bias_views(slot)


def empty_slots(num_slots: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Allocate ``[num_slots, rows, columns]`` on the CPU, each slot contiguous and aligned."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    unit = ALIGNMENT_BYTES // itemsize
    stride = -(-rows * columns // unit) * unit
    flat = torch.empty(num_slots * stride + FIRST_ALIGNMENT_BYTES // itemsize, dtype=dtype)
    prefer_huge_pages(flat)
    skip = -flat.data_ptr() % FIRST_ALIGNMENT_BYTES // itemsize
    return flat[skip:].as_strided((num_slots, rows, columns), (stride, columns, 1))
