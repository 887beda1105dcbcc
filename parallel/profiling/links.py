"""What is timed on links: hops of rows as a layer's path does them, and sums.

T rows here, D model width, K choices, P ranks of the group.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..experts.hop import Level, send, send_back
from ..planning.cost_model import Operation
from .measure import Probe, Trial


def hop_probes(
    there: Operation,
    back: Operation,
    level: Level,
    amounts: Sequence[int],
    *,
    num_experts: int,
    num_choices: int,
    d_model: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Probe]:
    """Return probes of a level of a path, there and back, for routes drawn evenly.

    Amounts are rows. Sizes are the bytes of the copies of rows that are sent.
    """

    def prepare(amount: int, is_there: bool) -> Trial:
        x_TD = torch.zeros(amount, d_model, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        weights_TK = torch.zeros(amount, num_choices, dtype=wide, device=device)
        generator = torch.Generator().manual_seed(amount)
        scores_TE = torch.rand(amount, num_experts, generator=generator)
        hops = level.plan([scores_TE.topk(num_choices).indices.to(device)])
        copies = sum(hops[0].sent_P)
        row_bytes = d_model * x_TD.element_size()
        if is_there:
            return Trial(copies * row_bytes, lambda: send(hops, [[x_TD, weights_TK]], True))
        y_ND = torch.zeros(sum(hops[0].received_P), d_model, dtype=dtype, device=device)
        return Trial(copies * row_bytes, lambda: send_back(hops, [[y_ND]]))

    return [
        Probe(there, amounts, lambda amount: prepare(amount, True)),
        Probe(back, amounts, lambda amount: prepare(amount, False)),
    ]


def all_reduce_probe(
    operation: Operation, group: dist.ProcessGroup, amounts: Sequence[int], device: torch.device
) -> Probe:
    """Return a probe of a sum over all ranks; amounts and sizes are bytes."""

    def prepare(amount: int) -> Trial:
        buffer = torch.zeros(max(1, amount // 4), device=device)  # fp32
        return Trial(buffer.nbytes, lambda: dist.all_reduce(buffer, group=group))

    return Probe(operation, amounts, prepare)
