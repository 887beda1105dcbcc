"""One rank: a clipped step of DeepSpeed's own MoE layer and engine, for EP 1 and 2.

    torchrun ... deepspeed_clip_worker.py OUT

Rank 0 writes to OUT, for each degree, the norm of the gate's update with and without clipping.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

WIDTH, EXPERTS, ROWS = 8, 4, 32


class Layer(nn.Module):
    def __init__(self, ep: int) -> None:
        super().__init__()
        self.moe = MoE(
            hidden_size=WIDTH,
            expert=nn.Linear(WIDTH, WIDTH, bias=False),
            num_experts=EXPERTS,
            ep_size=ep,
            k=2,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return (self.moe(x_TD)[0] ** 2).mean()


def update_of_gate(ep: int, clip: float) -> float:
    """Return how far a step with learning rate 1 moves the gate's weights."""
    layer = Layer(ep)
    gate = layer.moe.deepspeed_moe.gate.wg.weight
    experts = layer.moe.deepspeed_moe.experts.deepspeed_experts
    drawn = torch.Generator().manual_seed(0)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=drawn)
    with torch.no_grad():
        gate.copy_(torch.randn(EXPERTS, WIDTH, generator=drawn))
        first = dist.get_rank() % ep * len(experts)
        for expert, weight in zip(experts, weights[first:], strict=False):
            expert.weight.copy_(weight)
    before = gate.detach().clone()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(layer.parameters()), "name": "all"}
    )
    config = {"train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": clip}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    engine = deepspeed.initialize(model=layer, optimizer=optimizer, config=config)[0]
    rows = torch.randn(2, ROWS, WIDTH, generator=drawn)
    engine.backward(engine(rows[dist.get_rank()]))
    engine.step()
    return float((gate.detach() - before).norm())


def main() -> None:
    # A library that DeepSpeed would compile for inference on CPUs.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    deepspeed.init_distributed(dist_backend="gloo")
    found = {
        f"ep {ep}, {name}": update_of_gate(ep, clip)
        for ep in (1, 2)
        for name, clip in (("free", 0.0), ("clipped", 0.05))
    }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
