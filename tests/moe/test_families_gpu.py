"""Whole models on a GPU, experts and routers in Triton: transformers' numbers and our CPU's."""

import copy

import pytest
import torch

import moeyard
from moeyard.moe.batch import batch_of
from moeyard.moe.folders.convert import convert

from hf_families import CASES, save

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4


def some_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_on_a_gpu_are_those_of_transformers(case, tmp_path):
    theirs, ours = save(case, tmp_path), moeyard.load(tmp_path, device="cuda")
    ids = some_ids(3, 41)
    mask = torch.ones(3, 41, dtype=torch.long)
    mask[0, :9], mask[1, :30] = 0, 0
    expected = theirs(ids, attention_mask=mask).logits * mask.unsqueeze(-1)
    found = ours(ids.cuda(), attention_mask=mask.cuda()).cpu()
    assert (found - expected).abs().max() <= TOLERANCE
    expected = theirs.generate(ids, do_sample=False, max_new_tokens=40, attention_mask=mask)
    options = {"max_new_tokens": 40, "temperature": 0, "attention_mask": mask.cuda()}
    assert torch.equal(ours.generate(ids.cuda(), **options).cpu(), expected)


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral_window_tied"])
def test_gradients_on_a_gpu_are_those_of_the_cpu(case, tmp_path):
    save(case, tmp_path)
    on_cpu = moeyard.load(tmp_path).decoder.train().requires_grad_(True)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    grads = []
    for decoder in (on_cpu, on_gpu):
        rows = [row.to(decoder.embed_tokens.weight.device) for row in some_ids(4, 60)]
        logits_TV = decoder.logits(decoder(batch_of(rows)).hidden_TD)
        targets_T = torch.cat(rows).roll(-1)
        torch.nn.functional.cross_entropy(logits_TV, targets_T).backward()
        grads.append({name: p.grad.cpu() for name, p in decoder.named_parameters()})
    for name, expected in grads[0].items():
        scale = expected.abs().max().clamp(min=1e-3)
        assert (grads[1][name] - expected).abs().max() <= 1e-3 * scale, name


@torch.no_grad()
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_experts_of_few_bits_on_a_gpu_give_the_cpus_logits(bits, tmp_path):
    save("qwen3_moe", tmp_path / "plain", hidden_size=64, moe_intermediate_size=32)
    convert(tmp_path / "plain", tmp_path / bits, dtype=bits)
    ids = some_ids(3, 41)
    expected = moeyard.load(tmp_path / bits)(ids)
    ours = moeyard.load(tmp_path / bits, device="cuda")
    assert (ours(ids.cuda()).cpu() - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_bf16_on_a_gpu_is_as_near_to_fp32_as_transformers_is(tmp_path):
    theirs = save("qwen3_moe", tmp_path)
    ids = some_ids(3, 41)
    expected = theirs(ids).logits
    ours = moeyard.load(tmp_path, dtype="bfloat16", device="cuda")
    error = (ours(ids.cuda()).float().cpu() - expected).square().mean()
    usual = (theirs.bfloat16()(ids).logits.float() - expected).square().mean()
    assert error <= 2 * usual
