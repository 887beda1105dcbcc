"""LoRA experts in a dense MLP: a loop over tokens, plain LoRA as a special case, the router."""

import pytest
import torch

from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.gated_mlp import GatedMLP
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.lora import LoraLinear, add_lora
from moeyard.moe.models.lora_experts import LoraExpertsMLP, LoraMixture
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.routing import RouterInput

SCALE = 1.5
MATRICES = ("fc1_lora_a", "fc1_lora_b", "fc2_lora_a", "fc2_lora_b")


def random_mlp(weighting: str, num_experts: int = 3, rank: int = 4) -> LoraExpertsMLP:
    """Return an fp64 MLP whose factors and router are drawn."""
    torch.manual_seed(0)
    mixture = LoraMixture(num_experts, weighting, balance_loss=0.1)
    mlp = LoraExpertsMLP(GatedMLP(12, 20), mixture, rank, SCALE).double()
    for name, parameter in mlp.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_("lora" in name or "gate." in name)
    return mlp


def by_token(mlp: LoraExpertsMLP, x: torch.Tensor, is_weighted: bool) -> torch.Tensor:
    """The same as a loop over tokens, with whole matrices ``W + w s B A``."""
    rows, factors = [], mlp.lora_experts
    probabilities = (x @ mlp.gate.weight.T + mlp.gate.bias).softmax(dim=-1)
    for token, p in zip(x, probabilities, strict=True):
        expert = int(p.argmax())
        a1, b1, a2, b2 = (getattr(factors, name)[expert] for name in MATRICES)
        factor = SCALE * p[expert] if is_weighted else SCALE
        gate = mlp.gate_proj.weight + factor * b1[:20] @ a1[:4]
        up = mlp.up_proj.weight + factor * b1[20:] @ a1[4:]
        act = torch.nn.functional.silu(gate @ token) * (up @ token)
        rows.append((mlp.down_proj.weight + factor * b2 @ a2) @ act)
    return torch.stack(rows)


@pytest.mark.parametrize("weighting", ["none", "probability"])
def test_it_is_a_loop_over_tokens_with_all_gradients(weighting):
    mlp, x = random_mlp(weighting), torch.randn(29, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(29, 12, dtype=torch.float64)

    def gradients(y):
        leaves = [x, *(p for p in mlp.parameters() if p.requires_grad)]
        return torch.autograd.grad(y, leaves, upstream, allow_unused=True)

    routing = mlp.route(RouterInput(x))
    assert routing.counts_E.min() > 0, "every expert has tokens"
    y, right = mlp(x, routing=routing), by_token(mlp, x, weighting == "probability")
    assert (y - right).abs().max() < 1e-12 * right.abs().max()
    for found, expected in zip(gradients(y), gradients(right), strict=True):
        if expected is None:
            assert found is None or not found.any()
        else:
            assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_the_papers_router_learns_from_the_balance_loss_alone():
    """Exactly nothing comes from the task, unless the update is weighted."""
    for weighting, learns in (("none", False), ("probability", True)):
        mlp = random_mlp(weighting).float()
        x = torch.randn(64, 12)
        routing = mlp.route(RouterInput(x))
        gradients = torch.autograd.grad(
            mlp(x, routing=routing).square().sum(),
            [mlp.gate.weight, mlp.gate.bias],
            allow_unused=True,
            retain_graph=True,
        )
        assert all((g is not None and bool(g.any())) == learns for g in gradients)
        loss = auxiliary_losses([routing], [mlp.gate], lambda counts: counts)
        assert 1.0 <= float(loss.balance) < 3.0
        assert float(loss.total.detach()) == pytest.approx(0.1 * float(loss.balance))
        of_balance = torch.autograd.grad(loss.total, [mlp.gate.weight, mlp.gate.bias])
        assert all(g.any() for g in of_balance)


DENSE = ModelConfig(vocab_size=50, d_model=16, num_layers=2, num_heads=2, d_ff=20)


def decoder(mixture: LoraMixture | None) -> Decoder:
    found = Decoder(DENSE).double()
    initialize(found, 1)
    add_lora(found, 3, 6, ["attention", "mlp"], 2, mixture)
    return found


def test_equal_experts_are_plain_lora():
    plain, mixed = decoder(None), decoder(LoraMixture(4))
    torch.manual_seed(3)
    for layer, twin in zip(plain.layers, mixed.layers, strict=True):
        gate, up, down = (getattr(layer.mlp, f"{n}_proj") for n in ("gate", "up", "down"))
        assert all(isinstance(linear, LoraLinear) for linear in (gate, up, down))
        for linear in (gate, up, down):
            torch.nn.init.normal_(linear.lora_b)
        factors = twin.mlp.lora_experts
        factors.fc1_lora_a.data[:] = torch.cat([gate.lora_a, up.lora_a])
        factors.fc1_lora_b.data[:] = torch.cat([gate.lora_b, up.lora_b])
        factors.fc2_lora_a.data[:], factors.fc2_lora_b.data[:] = down.lora_a, down.lora_b
    batch = batch_of_rows(torch.randint(0, 50, (2, 17)))
    right, found = plain(batch), mixed(batch)
    assert (found.hidden_TD - right.hidden_TD).abs().max() < 1e-12
    assert right.routings == [] and [len(r.counts_E) for r in found.routings] == [4, 4]
    assert all(int(r.counts_E.sum()) == 34 for r in found.routings)


def test_updates_begin_as_nothing_and_are_drawn_by_name_and_expert():
    base = Decoder(DENSE).double()
    initialize(base, 1)
    batch = batch_of_rows(torch.randint(0, 50, (2, 17)))
    fresh = decoder(LoraMixture(4))
    assert fresh(batch).hidden_TD.equal(base(batch).hidden_TD)
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert all("lora" in name or ".mlp.gate." in name for name in trained)
    assert sum(".mlp." in name for name in trained) == 2 * 6
    few, many = decoder(LoraMixture(2)), decoder(LoraMixture(4))
    for one, two in zip(few.layers, many.layers, strict=True):
        a2, a4 = one.mlp.lora_experts.fc1_lora_a, two.mlp.lora_experts.fc1_lora_a
        assert a4[:2].equal(a2) and not a4[2].equal(a4[0])
        assert not two.mlp.gate.bias.any() and two.mlp.gate.weight.std() > 0.1
