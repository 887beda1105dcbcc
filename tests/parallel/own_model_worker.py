"""One of two ranks that train a model of a user's own, as docs/own-models.md shows.

Both compare their gradients with those of one process that has all rows, and print "done".
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moeyard
from moeyard.parallel.experts.all_to_all import AllToAllPath
from moeyard.parallel.experts.exchange import open_exchange
from moeyard.parallel.mesh import build_mesh

D, E = 12, 4
LOSSES = {"balance_loss": 0.3, "z_loss": 0.1, "sequence_balance_loss": 0.2}


class Model(nn.Module):
    """Two MoE layers, one of which pools with nothing; a head."""

    def __init__(self, expert_ids=None) -> None:
        super().__init__()
        self.moe = nn.ModuleList(
            moeyard.MoELayer(
                D,
                8,
                E,
                moeyard.TopK(k=2, balance_over=over, **LOSSES),
                expert_ids=expert_ids,
                backend="reference",
            )
            for over in ("layer", "model")
        )
        self.head = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[moeyard.Routing]]:
        routings = []
        for layer in self.moe:
            y, routing = layer(x)
            x = x + y
            routings.append(routing)
        return self.head(x), routings


def sum_over_ranks(counts: Tensor) -> Tensor:
    dist.all_reduce(counts)
    return counts


def whole_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def one_process(batches: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the auxiliary loss and all gradients of a step of several micro-batches."""
    model, total = whole_model(), 0.0
    for x in batches:
        y, routings = model(x)
        auxiliary = moeyard.auxiliary_loss(model.moe, routings)
        ((y.square().mean() + auxiliary) / len(batches)).backward()
        total += float(auxiliary.detach()) / len(batches)
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(name: str, found: Tensor | None, expected: Tensor) -> None:
    assert found is not None and expected.abs().max() > 0, name
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13, msg=lambda m: f"{name} {m}")


def steps(model: nn.Module, layers: nn.ModuleList, batches: list[Tensor]) -> float:
    """Run backward over this rank's half of each micro-batch; return its share of the loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = 0.0
    for x in batches:
        y, routings = model(x.chunk(world)[rank])
        auxiliary = moeyard.auxiliary_loss(layers, routings, sum_over_ranks)
        ((y.square().mean() + world * auxiliary) / len(batches)).backward()
        share += float(auxiliary.detach()) / len(batches)
    return share


def check_share(share: float, expected: float) -> None:
    total = torch.tensor(share, dtype=torch.float64)
    dist.all_reduce(total)
    compare("the sum of the shares", total, torch.tensor(expected, dtype=torch.float64))
    assert abs(share - expected / 2) > 1e-6, "halves would show nothing"


def check_ddp(batches: list[Tensor]) -> None:
    expected, gradients = one_process(batches)
    model = whole_model()
    check_share(steps(DistributedDataParallel(model), model.moe, batches), expected)
    for name, parameter in model.named_parameters():
        compare(name, parameter.grad, gradients[name])


def check_ep(batches: list[Tensor]) -> None:
    expected, gradients = one_process(batches)
    mesh, whole = build_mesh(2, E), whole_model()
    model = Model(mesh.local_experts(E)).double()
    exchange = open_exchange(mesh.ep_group, mesh.ep_host)
    names = {f"moe.{n}.experts.{part}" for n in range(2) for part in ("fc1", "fc2")}
    here = slice(mesh.local_experts(E).start, mesh.local_experts(E).stop)
    state = whole.state_dict()
    model.load_state_dict({k: v[here] if k in names else v for k, v in state.items()})
    for layer in model.moe:
        layer.path = AllToAllPath(E, mesh, exchange)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    check_share(steps(DistributedDataParallel(model), model.moe, batches), expected)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.grad /= mesh.world_size
        compare(name, parameter.grad, gradients[name][here] if name in names else gradients[name])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 7, D, dtype=torch.float64, generator=generator) for _ in range(2)]
    check_ddp(batches)
    check_ep(batches)
    print("done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
