"""Plain expert weights laid out so that channels which count as 0 need not be read.

A channel is one of the F values between an expert's products, or one of the D inputs of the first.
``fc2`` has a channel's weights side by side. So has ``fc1`` for a channel's row of up, and, stored
by input, for an input.

S slots, E experts, F expert width, D model width, H rows of fc1: 2F with a gate, F without.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .activation import UNGATED, Activation, fc1_rows, gated
from .expert_weights import SlotTable, check_biases, check_slots, empty_slots


@dataclass(frozen=True, slots=True)
class ChannelLimits:
    """What counts as 0 in each expert of a layer: values whose size is at most the limit.

    fp32 and dense. Thresholds of a score ``|v| * norm`` are limits ``threshold / norm``.
    """

    x_ED: Tensor | None = None
    """Of an expert's input."""
    gate_EF: Tensor | None = None
    """Of ``act(gate)``; of ``act(up)`` without a gate."""
    act_EF: Tensor | None = None
    """Of ``act(gate) * factor(up)``, or ``act(up)``."""


@dataclass(frozen=True, slots=True)
class ChannelExpertWeights(SlotTable):
    """Expert weights by channel, for inference on a CPU.

    Without ``limits`` the result is that of the same weights in :class:`ExpertWeights`, bit for
    bit, for finite weights.
    """

    fc1: Tensor
    """``[S, H, D]``, gate rows first, or ``[S, D, H]`` if ``by_input``."""
    fc2_SFD: Tensor
    """``[S, F, D]``."""
    _: KW_ONLY
    by_input: bool = False
    """How fc1 is stored: by input pays where x has limits."""
    slot_of_E: Sequence[int] | None = None
    """Slot of each expert, -1 if it is not here; None if slot e holds expert e."""
    activation: Activation = "swiglu"
    limits: ChannelLimits | None = None
    """None = only what is 0 counts as 0."""
    fc1_bias_SH: Tensor | None = None
    fc2_bias_SD: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for shapes that do not belong together."""
        fc1, (slots, width, d_model) = tuple(self.fc1.shape), self.fc2_SFD.shape
        rows = fc1_rows(width, self.activation)
        wanted = (d_model, rows) if self.by_input else (rows, d_model)
        if fc1 != (slots, *wanted):
            raise ValueError(
                f"fc1 {fc1} and fc2 {(slots, width, d_model)} do not fit; fc1 must be "
                f"{(slots, *wanted)}."
            )
        check_slots(self)
        check_biases(self.fc1_bias_SH, self.fc2_bias_SD, (slots, rows), (slots, d_model))
        self._check_limits(width, d_model)

    def _check_limits(self, width: int, d_model: int) -> None:
        if self.limits is None:
            return
        widths = ((self.limits.x_ED, d_model), (self.limits.gate_EF, width))
        for limits, wide in (*widths, (self.limits.act_EF, width)):
            if limits is None:
                continue
            if limits.dtype != torch.float32 or not limits.is_contiguous():
                raise ValueError("limits must be fp32 and dense.")
            if tuple(limits.shape) != (self.num_experts, wide):
                raise ValueError(
                    f"limits are {tuple(limits.shape)}; they must be {(self.num_experts, wide)}."
                )

    @property
    def num_slots(self) -> int:
        """S."""
        return self.fc2_SFD.shape[0]

    @property
    def d_model(self) -> int:
        """D."""
        return self.fc2_SFD.shape[2]

    def expert_in(self, slot: int) -> int:
        """Return the expert that a slot holds."""
        return slot if self.slot_of_E is None else self.slot_of_E.index(slot)

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """fc1 and fc2 as they are stored."""
        return self.fc1, self.fc2_SFD

    def matrices(self, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return fc1 ``[H, D]`` and fc2 ``[D, F]`` of a slot, dense; they are in ``dtype``."""
        assert self.fc2_SFD.dtype == dtype, "the experts have another type"
        fc1, fc2_DF = self.fc1[slot], self.fc2_SFD[slot].mT
        return (fc1.mT if self.by_input else fc1).contiguous(), fc2_DF.contiguous()

    def slot_views(self, slot: int) -> dict[str, Tensor]:
        """Return the writable parts of a slot, as :meth:`ExpertWeights.slot_views` does.

        They are not all dense.
        """
        fc1 = self.fc1[slot]
        views = self.fc1_views(fc1.mT if self.by_input else fc1)
        return views | {"down": self.fc2_SFD[slot].mT} | self.bias_views(slot)

    def keep_x(self, x_ND: Tensor, expert: int) -> Tensor:
        """Return an expert's input with 0 for what is at most the limit."""
        limits_ED = None if self.limits is None else self.limits.x_ED
        return x_ND if limits_ED is None else _above(x_ND, x_ND, limits_ED[expert])

    def activate(self, h_NH: Tensor, expert: int) -> Tensor:
        """Return ``act(gate) * factor(up)``, ``[N, F]``, with 0 for what is at most a limit."""
        act_NF = gated(h_NH, self.activation)
        if self.limits is None:
            return act_NF
        if self.limits.gate_EF is not None:
            scored_NF = gate_values(h_NH, self.activation)
            act_NF = _above(act_NF, scored_NF, self.limits.gate_EF[expert])
        if self.limits.act_EF is not None:
            act_NF = _above(act_NF, act_NF, self.limits.act_EF[expert])
        return act_NF


def gate_values(h_NH: Tensor, activation: Activation) -> Tensor:
    """Return ``act(gate)``, or ``act(up)`` without a gate: ``[N, F]``."""
    if activation in UNGATED:
        return gated(h_NH, activation)
    gate_NF = h_NH.chunk(2, dim=-1)[0]
    ones_NF = torch.ones_like(gate_NF) if activation != "clamped_swiglu" else gate_NF * 0
    return gated(torch.cat((gate_NF, ones_NF), dim=-1), activation)


def empty_channel_slots(
    num_slots: int,
    d_model: int,
    d_expert: int,
    by_input: bool,
    dtype: torch.dtype,
    activation: Activation = "swiglu",
) -> tuple[Tensor, Tensor]:
    """Allocate fc1 and fc2 of :class:`ChannelExpertWeights` on the CPU."""
    rows = fc1_rows(d_expert, activation)
    shape1 = (d_model, rows) if by_input else (rows, d_model)
    return (
        empty_slots(num_slots, *shape1, dtype),
        empty_slots(num_slots, d_expert, d_model, dtype),
    )


def _above(values_NC: Tensor, scored_NC: Tensor, limits_C: Tensor) -> Tensor:
    """Return ``values`` with 0 where ``|scored|`` is at most the limit. NaN never is."""
    return torch.where(scored_NC.float().abs() <= limits_C, 0, values_NC)
