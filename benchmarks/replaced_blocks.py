"""Does a transformers model with our MoE layers compute and train as before, and how fast?

    python benchmarks/replaced_blocks.py

For every family: the largest difference of logits and of gradients, in fp32, as a share of the
largest value. Then the time of a training step with and without our layers, in turn, as the median
of the ratios.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeyard

from report import write_results

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "moe"))
from hf_families import make

CASES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2_groups_yarn", "deepseek_v3")
CASES += ("gpt_oss",)
ROUNDS = 15


def main() -> None:
    families = {case: difference(case) for case in CASES}
    for case, (logits, grads) in families.items():
        print(f"{case:24}  logits {logits:.1e}  gradients {grads:.1e}")
    ratios = {name: step_ratio(dtype) for name, dtype in DTYPES.items()}
    for name, found in ratios.items():
        print(
            f"{name}: a step with our layers takes {found[ROUNDS // 2]:.2f} of transformers' time "
            f"(median of {ROUNDS} pairs, from {found[0]:.2f} to {found[-1]:.2f})"
        )
    values = {"question": __doc__.splitlines()[0], "differences": families, "ratios": ratios}
    print(f"written to {write_results('replaced_blocks', values)}")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def difference(case: str) -> tuple[float, float]:
    """Return the largest relative differences of logits and gradients."""
    theirs = make(case)
    ours = copy.deepcopy(theirs)
    moeyard.replace_moe_blocks(ours)
    ids = torch.arange(60).view(3, 20)
    logits = relative(ours(ids).logits.detach(), theirs(ids).logits.detach())
    found, right = gradients(ours, ids), gradients(theirs, ids)
    return logits, max(relative(found[name], right[name]) for name in right)


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return gradients under transformers' names: in the place of a copy's weights."""
    model.train()(ids, labels=ids).loss.backward()
    carrier = copy.deepcopy(model)
    for (_, parameter), own in zip(carrier.named_parameters(), model.parameters(), strict=True):
        parameter.data = own.grad.clone()
    return {name: t for name, t in carrier.state_dict().items() if "correction_bias" not in name}


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


def step_ratio(dtype: torch.dtype) -> list[float]:
    """Return the sorted ratios of a step's time, ours by theirs."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, moe_intermediate_size=256, num_experts=32,
        num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    theirs = Qwen3MoeForCausalLM(config).to(dtype).train()
    ours = copy.deepcopy(theirs)
    moeyard.replace_moe_blocks(ours)
    ids = torch.randint(0, 4096, (4, 256))
    times = [[seconds(model, ids) for model in (ours, theirs)] for _ in range(ROUNDS + 1)]
    print(f"{dtype}: {statistics.median(t for _, t in times[1:]):.2f} s a step in transformers")
    return sorted(round(mine / other, 3) for mine, other in times[1:])


def seconds(model: nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
