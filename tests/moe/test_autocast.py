"""Under torch.autocast a layer and a model compute as torch's own modules do, routers in fp32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeyard
from moeyard.moe.batch import batch_of_rows

from hf_families import CASES, save

T, D = 37, 16


def layer_and_input(low_rank=False):
    torch.manual_seed(0)
    layer = moeyard.MoELayer(D, 24, 6, moeyard.TopK(k=2), d_shared=8, shared_gate=True)
    if low_rank:
        layer.experts.requires_grad_(False)
        layer.experts.add_low_rank(2, 0.5)
        for name in ("fc1_lora_a", "fc1_lora_b", "fc2_lora_a", "fc2_lora_b"):
            nn.init.normal_(getattr(layer.experts, name), std=0.3)
    return layer, torch.randn(T, D).bfloat16().requires_grad_()


@pytest.mark.parametrize("low_rank", [False, True], ids=["all", "low_rank"])
def test_experts_compute_in_bf16_and_their_gradients_come_back_in_fp32(low_rank):
    layer, x = layer_and_input(low_rank)
    narrow = copy.deepcopy(layer)
    narrow.experts.bfloat16(), narrow.shared_expert.bfloat16(), narrow.shared_expert_gate.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
    right, expected = narrow(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, right)
    assert torch.equal(routing.experts_TK, expected.experts_TK)
    upstream = torch.randn(T, D).bfloat16()
    trained = [p for p in layer.parameters() if p.requires_grad]
    narrow_ones = [p for p in narrow.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, [x, *trained], upstream)
    wanted = torch.autograd.grad(right, [x, *narrow_ones], upstream)
    for grad, leaf, other in zip(found, [x, *trained], wanted, strict=True):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad, other.to(grad.dtype), rtol=1e-2, atol=1e-3)


def test_the_router_chooses_in_fp32():
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        _, routing = layer(x)
    logits = F.linear(x.float(), layer.gate.weight)
    best = logits.softmax(dim=-1).topk(2)
    assert torch.equal(routing.experts_TK.long(), best.indices)
    assert routing.weights_TK.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        coarse = F.linear(x, layer.gate.weight).float()
    assert not torch.equal(coarse, logits), "the test would not see a bf16 router"


@pytest.mark.parametrize("has_gradients", [True, False], ids=["training", "inference"])
def test_a_linear_may_feed_a_layer(has_gradients):
    layer, _ = layer_and_input()
    before, after = nn.Linear(8, D), nn.Linear(D, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(has_gradients):
        y = after(layer(before(torch.randn(T, 8)))[0])
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    if has_gradients:
        y.float().square().sum().backward()
        assert before.weight.grad.abs().max() > 0 and layer.experts.fc1.grad.dtype == torch.float32


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_models_train_with_nearly_the_loss_of_fp32(case, tmp_path):
    assert case in CASES
    save(case, tmp_path)
    model = moeyard.load(tmp_path).decoder.train().requires_grad_()
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    losses = []
    for is_enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            logits_TV = model.logits(model(batch_of_rows(ids)).hidden_TD)
        loss = F.cross_entropy(logits_TV[:-1].float(), ids.flatten()[1:])
        losses.append(loss)
    losses[1].backward()
    assert abs(losses[1] - losses[0]) < 0.05 * losses[0]
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
