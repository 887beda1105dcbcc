"""Matrix products of consecutive row groups with one matrix each.

N rows in expert order, E experts, S slots, P inputs and Q outputs of a weight matrix.
"""

from collections.abc import Iterable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_weights import ExpertWeights
from .grouping import Grouping

# F.grouped_mm over a loop of torch.mm, CPU with AVX512-BF16, 2 threads, 32 groups of [512, 512]:
# 0.84 of the loop's time in bf16 and 0.97 in fp32 at 2 rows a group, 0.98 and 0.99 at 256
# (benchmarks/constants.py). Inference on the CPU always takes the loop, which pads lone bf16 rows.
GROUPED_MM_MAX_ROWS_PER_GROUP = 16


class GroupedMatmul:
    """The three products of a linear layer, group by group.

    On a GPU one bf16 ``F.grouped_mm`` serves all groups without a host synchronisation, also where
    a rank holds a consecutive share of the experts: rows of the others then come after all of its
    own, or not at all. On the CPU a loop over the groups that have rows is as fast or faster,
    save where groups are tiny.
    ``only`` restricts the work to some experts and leaves all other rows untouched.
    """

    def __init__(
        self, grouping: Grouping, experts: ExpertWeights, only: Iterable[int] | None = None
    ) -> None:
        self._offsets_E1 = grouping.offsets_E1
        here = experts.consecutive
        self._slot_ends = (
            None if here is None else grouping.offsets_E1[here.start + 1 : here.stop + 1]
        )
        self._experts = experts
        self._only = only
        rows = grouping.order_R.numel()
        fc1, fc2 = experts.fc1_SHD, experts.fc2_SDF
        allowed = (
            only is None
            and here is not None
            and fc1.dtype in (torch.float32, torch.bfloat16)
            and all(w.is_contiguous() for w in (fc1, fc2))
            and all(side * fc1.element_size() % 16 == 0 for side in (*fc1.shape[1:], fc2.shape[2]))
        )
        few_rows = rows < GROUPED_MM_MAX_ROWS_PER_GROUP * fc1.shape[0]
        # On GPUs grouped_mm is there for bf16 alone; other types take the loop and its one sync.
        self.is_fused = allowed and (fc1.dtype == torch.bfloat16 if fc1.is_cuda else few_rows)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Host-side ``(slot, first row, end row)`` of every group that has rows."""
        bounds = self._offsets_E1.tolist()
        experts = range(len(bounds) - 1) if self._only is None else self._only
        spans = []
        for expert in experts:
            if bounds[expert] < bounds[expert + 1]:
                slot = self._experts.slot(expert)
                assert slot >= 0, f"expert {expert} has rows but no slot"
                spans.append((slot, bounds[expert], bounds[expert + 1]))
        return spans

    def linear(self, x_NP: Tensor, weight_SQP: Tensor) -> Tensor:
        """Return ``x @ weight[slot].T``; rows outside the groups are undefined."""
        if self.is_fused:
            return F.grouped_mm(x_NP, weight_SQP.transpose(1, 2), offs=self._slot_ends)
        out_NQ = x_NP.new_empty(x_NP.shape[0], weight_SQP.shape[1])
        for slot, start, end in self.spans:
            torch.mm(x_NP[start:end], weight_SQP[slot].t(), out=out_NQ[start:end])
        return out_NQ

    def linear_grad_input(self, grad_NQ: Tensor, weight_SQP: Tensor) -> Tensor:
        """Return ``grad @ weight[slot]``; rows outside the groups are undefined."""
        if self.is_fused:
            return F.grouped_mm(grad_NQ, weight_SQP, offs=self._slot_ends)
        out_NP = grad_NQ.new_empty(grad_NQ.shape[0], weight_SQP.shape[2])
        for slot, start, end in self.spans:
            torch.mm(grad_NQ[start:end], weight_SQP[slot], out=out_NP[start:end])
        return out_NP

    def linear_grad_weight(self, grad_NQ: Tensor, x_NP: Tensor, weight_SQP: Tensor) -> Tensor:
        """Return ``grad.T @ x`` of every slot; slots without rows get zeros."""
        if self.is_fused:
            return F.grouped_mm(grad_NQ.t(), x_NP, offs=self._slot_ends)
        if len(self.spans) < weight_SQP.shape[0]:
            out_SQP = torch.zeros_like(weight_SQP)
        else:
            out_SQP = torch.empty_like(weight_SQP)
        for slot, start, end in self.spans:
            torch.mm(grad_NQ[start:end].t(), x_NP[start:end], out=out_SQP[slot])
        return out_SQP
