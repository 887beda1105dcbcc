"""What is timed of the experts here: forward and backward, through the kernels they train with.

N rows, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...moe.experts.base import LayerExperts
from .measure import Probe, Trial


def expert_probes(
    experts: LayerExperts,
    expert_ids: Sequence[int],
    d_model: int,
    dtype: torch.dtype,
    device: torch.device,
    amounts: Sequence[int],
) -> list[Probe]:
    """Return probes of a layer's experts here, of which ``expert_ids`` are the logical ids.

    Amounts and sizes are routed rows, spread evenly over the experts. Backward leaves gradients in
    the main gradients, which every step begins by forgetting, or nowhere.
    """
    ids = torch.tensor(expert_ids, device=device)

    def inputs(amount: int) -> tuple[Tensor, Tensor, Tensor]:
        # Nothing here may draw from the global generator: routers do while training.
        generator = torch.Generator(device).manual_seed(amount)
        x_ND = torch.randn(amount, d_model, generator=generator, device=device).to(dtype)
        x_ND.requires_grad_()
        experts_N1 = ids[torch.arange(amount, device=device) % len(ids)].unsqueeze(1)
        wide = torch.promote_types(dtype, torch.float32)
        weights_N1 = torch.ones(amount, 1, dtype=wide, device=device, requires_grad=True)
        return x_ND, experts_N1, weights_N1

    def forward(amount: int) -> Trial:
        rows = inputs(amount)
        return Trial(amount, lambda: experts(*rows))

    def backward(amount: int) -> Trial:
        rows = inputs(amount)
        results: list[Tensor] = []

        def run() -> None:
            y_ND = results.pop()
            wanted = [rows[0], rows[2], *(p for p in experts.parameters() if p.requires_grad)]
            torch.autograd.grad(y_ND, wanted, torch.ones_like(y_ND), allow_unused=True)

        return Trial(amount, run, before=lambda: results.append(experts(*rows)))

    return [Probe("experts", amounts, forward), Probe("experts_backward", amounts, backward)]
