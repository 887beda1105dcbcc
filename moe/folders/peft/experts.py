"""An adapter's factors of experts: peft's layout, and that of one update for all experts.

E experts, P rank, D model width, F expert width, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.values.expert_update import ExpertUpdate
from .tensors import Factors

Stacked = tuple[Tensor, Tensor]
"""A ``[E, P, I]`` and B ``[E, O, P]``."""


def from_peft(factors: Factors, num_experts: int) -> Stacked:
    """Return A and B by expert.

    peft has A ``[E P, I]`` with the experts one after the other, and B ``[O, P E]`` with the
    experts innermost.
    """
    a_EPI = factors.a.unflatten(0, (num_experts, -1))
    b_EOP = factors.b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    return a_EPI, b_EOP


def to_peft(a_EPI: Tensor, b_EOP: Tensor) -> Factors:
    """Undo :func:`from_peft`."""
    return Factors(a_EPI.flatten(0, 1).contiguous(), b_EOP.permute(1, 2, 0).flatten(1).contiguous())


def joined(gate: Stacked, up: Stacked) -> Stacked:
    """Return the update of gate and up together, whose ranks add up: B has two blocks."""
    a_EPI = torch.cat((gate[0], up[0]), dim=1)
    (_, d_expert, gate_rank), up_rank = gate[1].shape, up[1].shape[2]
    b_EHP = a_EPI.new_zeros(len(a_EPI), 2 * d_expert, gate_rank + up_rank)
    b_EHP[:, :d_expert, :gate_rank] = gate[1]
    b_EHP[:, d_expert:, gate_rank:] = up[1]
    return a_EPI, b_EHP


def stacked(
    of_expert: Mapping[int, Factors], num_experts: int, num_inputs: int, num_outputs: int
) -> Stacked:
    """Return the factors of single experts together; zeros for experts and ranks without any."""
    rank = max((len(factors.a) for factors in of_expert.values()), default=1)
    a_EPI = torch.zeros(num_experts, rank, num_inputs)
    b_EOP = torch.zeros(num_experts, num_outputs, rank)
    for expert, (a, b) in of_expert.items():
        a_EPI[expert, : len(a)] = a
        b_EOP[expert, :, : len(a)] = b
    return a_EPI, b_EOP


Parts = Mapping[tuple[str, int | None], Factors]
"""The factors of a layer by part and expert: ``gate``, ``up`` and ``down`` of one expert each, or
``gate_up`` and ``down`` of all experts, where the expert is None."""


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The experts of a layer."""

    num_experts: int
    d_model: int
    d_expert: int
    is_interleaved: bool = False
    """Whether gate and up rows alternate in ``gate_up`` (gpt-oss)."""
    has_gate: bool = True

    def shape(self, part: str) -> tuple[int, int]:
        """Return inputs and outputs of a part."""
        if part == "down":
            return self.d_expert, self.d_model
        return self.d_model, self.d_expert * (2 if part == "gate_up" else 1)


def update_of(parts: Parts, sizes: ExpertSizes, like: Tensor) -> ExpertUpdate:
    """Return the update of a layer's experts in the type and on the device of ``like``."""
    gate_up = _of_all(parts, "gate_up", sizes)
    if gate_up is not None and sizes.is_interleaved:
        b_EHP = gate_up[1]
        gate_up = gate_up[0], torch.cat((b_EHP[:, 0::2], b_EHP[:, 1::2]), dim=1)
    if gate_up is None and any(part in ("gate", "up") for part, _ in parts):
        up = _of_each(parts, "up", sizes)
        gate_up = joined(_of_each(parts, "gate", sizes), up) if sizes.has_gate else up
    down = _of_all(parts, "down", sizes)
    if down is None and any(part == "down" for part, _ in parts):
        down = _of_each(parts, "down", sizes)
    return ExpertUpdate(cast(gate_up, like), cast(down, like))


def _of_all(parts: Parts, part: str, sizes: ExpertSizes) -> Stacked | None:
    factors = parts.get((part, None))
    return None if factors is None else from_peft(factors, sizes.num_experts)


def _of_each(parts: Parts, part: str, sizes: ExpertSizes) -> Stacked:
    of_expert = {
        expert: factors
        for (name, expert), factors in parts.items()
        if name == part and expert is not None
    }
    return stacked(of_expert, sizes.num_experts, *sizes.shape(part))


def cast(factors: Stacked | None, like: Tensor) -> Stacked | None:
    """Return factors in the type and on the device of ``like``, with an even rank."""
    if factors is None:
        return None
    a_EPI, b_EOP = factors
    odd = a_EPI.shape[1] % 2  # kernels multiply in pairs; a rank of zeros changes nothing
    a_EPI, b_EOP = F.pad(a_EPI, (0, 0, 0, odd)), F.pad(b_EOP, (0, odd))
    return a_EPI.to(like).contiguous(), b_EOP.to(like).contiguous()
