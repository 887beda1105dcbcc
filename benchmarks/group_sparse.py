"""What does pruning half of the experts' groups cost, and what does it gain?

    python benchmarks/group_sparse.py speed --write
    python benchmarks/group_sparse.py loss MODEL_DIR CALIBRATION.txt HELD_OUT.txt... --write

Loss: the perplexity of a trained model on held-out texts, with its experts in bf16, int8, int4 and
group-sparse int4, where groups are chosen by magnitude alone (plain), by the mean square of the
inputs (diagonal, which `moeyard convert` does), and by the inverse Hessian (1/[H^-1] as in OBS,
1/[H^-1]^2 as GQSA writes it). Speed: the experts alone, 2 threads, all formats in turn,
medians; and the fastest round, which says more on a machine that others use, too.

T tokens, E experts, D model width, F expert width.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.activation import gated
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.group_sparse import GroupSparseExpertWeights, GroupSparseMatrices
from moeyard.kernels.values.quantize import quantize_experts
from moeyard.kernels.values.quantized_weights import SlotWeights
from moeyard.kernels.values.sparsify import kept_groups, sparsify, sparsify_experts
from moeyard.moe.experts.quantized import QuantizedExperts
from moeyard.moe.experts.resident import Experts
from moeyard.moe.models.language_model import LanguageModel
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.loading import load

from report import write_results

CALIBRATION_TOKENS = 12288
HELD_OUT_CHARACTERS = 5_000
"""Of each text."""
DAMPING = 0.01
"""Share of a Hessian's mean diagonal that is added to it, as GPTQ does."""
SIZES = {"trained": (32, 4, 256, 128), "large": (8, 2, 2048, 1024)}
"""Experts, choices, D and F."""
TOKENS = (1, 2, 4, 8, 256)
ROUNDS = {1: 41, 2: 41, 4: 41, 8: 41, 256: 7}

Format = Callable[[ExpertWeights], SlotWeights]
FORMATS: dict[str, Format] = {
    "bf16": lambda experts: experts,
    "int8": lambda experts: quantize_experts(experts, 8),
    "int4": lambda experts: quantize_experts(experts, 4),
    "int4, groups of 32": lambda experts: quantize_experts(experts, 4, 32),
    "int4_sparse 25 %": lambda experts: sparsify_experts(experts, 0.25),
    "int4_sparse 50 %": lambda experts: sparsify_experts(experts, 0.5),
}


class Hessians(NamedTuple):
    """``sum x x^T`` over the rows of each expert of a layer, and how many rows."""

    rows_E: Tensor
    inputs_EDD: Tensor
    hidden_EFF: Tensor


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("speed").add_argument("--write", action="store_true")
    loss = parts.add_parser("loss")
    loss.add_argument("model", type=Path)
    loss.add_argument("calibration", type=Path)
    loss.add_argument("held_out", type=Path, nargs="+")
    loss.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if arguments.part == "speed":
        found = [row for size in SIZES for row in speeds_of(size)]
    else:
        found = losses_of(arguments.model, arguments.calibration, arguments.held_out)
    if arguments.write:
        write_results(f"group_sparse_{arguments.part}", {arguments.part: found})


def losses_of(folder: Path, calibration: Path, texts: list[Path]) -> list[dict]:
    model = load(folder, "bf16")
    layers = dict(model.decoder.moe_layers())
    plain = {index: layer.experts for index, layer in layers.items()}
    hessians = hessians_of(model, plain, calibration.read_text()[: 4 * CALIBRATION_TOKENS])
    few = sum(int((h.rows_E < 64).sum()) for h in hessians.values())
    print(f"{few} of {sum(len(h.rows_E) for h in hessians.values())} experts have under 64 rows")
    found = []

    def measure(name: str, make: Callable[[int, ExpertWeights], SlotWeights] | None) -> None:
        bytes_of_one = 0.0
        for index, layer in layers.items():
            experts = plain[index]
            layer.experts = experts
            weights: SlotWeights = weights_of(experts)
            if make is not None:
                weights = make(index, weights_of(experts))
                layer.experts = QuantizedExperts(weights)
            bytes_of_one = bytes_of(weights) / weights.num_slots
        scores = [score_text(model, t.read_text()[:HELD_OUT_CHARACTERS], 512) for t in texts]
        total = sum(s.loss * s.tokens for s in scores) / sum(s.tokens for s in scores)
        row = {
            "format": name,
            "bytes of an expert": bytes_of_one,
            "perplexity": math.exp(total),
            "by text": {t.name: s.perplexity for t, s in zip(texts, scores, strict=True)},
            "tokens": sum(s.tokens for s in scores),
        }
        found.append(row)
        by_text = ", ".join(f"{value:.3f}" for value in row["by text"].values())
        print(f"{name:34} {bytes_of_one:9.0f} B  {row['perplexity']:.4f}  ({by_text})", flush=True)

    measure("bf16", None)
    for name in ("int8", "int4", "int4, groups of 32"):
        measure(name, lambda _, experts, name=name: FORMATS[name](experts))
    for share in WAYS_OF:
        for way, importance in WAYS.items():
            if WAYS_OF[share] == "all" or way in WAYS_OF[share]:
                measure(
                    f"int4_sparse {share:.0%}, {way}",
                    lambda index, experts, share=share, importance=importance: pruned(
                        experts, hessians[index], share, importance
                    ),
                )
    return found


def hessians_of(model: LanguageModel, plain: dict[int, Experts], text: str) -> dict[int, Hessians]:
    """Run the model on a text; experts with few rows get the Hessians of all rows together."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:CALIBRATION_TOKENS]
    windows_BL = torch.tensor(ids)[: len(ids) // 512 * 512].view(-1, 512)
    found, handles = {}, []
    for index, experts in plain.items():
        num, width, d_expert = experts.fc2.shape
        sums = Hessians(
            torch.zeros(num), torch.zeros(num, width, width), torch.zeros(num, d_expert, d_expert)
        )
        found[index] = sums

        def see(module: Experts, inputs: tuple, sums: Hessians = sums) -> None:
            for expert in range(len(sums.rows_E)):
                x_nD = inputs[0][(inputs[1] == expert).any(dim=1)].float()
                if len(x_nD):
                    hidden = gated(x_nD @ module.fc1[expert].float().T, module.activation)
                    sums.rows_E[expert] += len(x_nD)
                    sums.inputs_EDD[expert] += x_nD.T @ x_nD
                    sums.hidden_EFF[expert] += hidden.T @ hidden

        handles.append(experts.register_forward_pre_hook(see))
    with torch.inference_mode():
        for some_BL in windows_BL.split(8):
            model(some_BL)
    for handle in handles:
        handle.remove()
    for sums in found.values():
        few = sums.rows_E < 64
        sums.inputs_EDD[few] = sums.inputs_EDD.sum(dim=0)
        sums.hidden_EFF[few] = torch.eye(sums.hidden_EFF.shape[1])
    return found


def inverse_diagonal(hessian_PP: Tensor) -> Tensor:
    damped = hessian_PP + DAMPING * hessian_PP.diagonal().mean() * torch.eye(len(hessian_PP))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped.double())).diagonal().float()


WAYS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "plain": lambda hessian: None,
    "diagonal": lambda hessian: hessian.diagonal(),
    "1/[H^-1]": lambda hessian: 1 / inverse_diagonal(hessian),
    "1/[H^-1]^2": lambda hessian: inverse_diagonal(hessian) ** -2,
}


WAYS_OF = {0.0: "plain", 0.25: "plain diagonal", 0.5: "all"}
"""What is measured at each sparsity."""


def pruned(
    experts: ExpertWeights,
    hessians: Hessians,
    share: float,
    importance: Callable[[Tensor], Tensor | None],
) -> GroupSparseExpertWeights:
    matrices = []
    for weight_SQP, all_of_them in (
        (experts.fc1_SHD, hessians.inputs_EDD),
        (experts.fc2_SDF, hessians.hidden_EFF),
    ):
        kept = kept_groups(weight_SQP.shape[2], share)
        views = [
            sparsify(weight_QP, importance(hessian), kept)
            for weight_QP, hessian in zip(weight_SQP, all_of_them, strict=True)
        ]
        parts = (torch.stack(part) for part in zip(*views, strict=True))
        matrices.append(GroupSparseMatrices(*parts, weight_SQP.shape[2]))
    return GroupSparseExpertWeights(*matrices, activation=experts.activation)


def weights_of(experts: Experts) -> ExpertWeights:
    return ExpertWeights(experts.fc1.data, experts.fc2.data, activation=experts.activation)


def bytes_of(weights: SlotWeights) -> int:
    if isinstance(weights, ExpertWeights):
        return weights.fc1_SHD.nbytes + weights.fc2_SDF.nbytes
    return weights.nbytes


def copies(one: SlotWeights, count: int) -> SlotWeights:
    """Return ``count`` experts with the weights of one: rounding many takes minutes."""
    if isinstance(one, ExpertWeights):
        return ExpertWeights(one.fc1_SHD.repeat(count, 1, 1), one.fc2_SDF.repeat(count, 1, 1))
    matrices = []
    for matrix in (one.fc1, one.fc2):
        parts = (part.repeat(count, 1, 1) for part in matrix.tensors)
        is_sparse = isinstance(matrix, GroupSparseMatrices)
        matrices.append(type(matrix)(*parts, *((matrix.width,) if is_sparse else ())))
    return type(one)(*matrices)


@torch.inference_mode()
def speeds_of(size: str) -> list[dict]:
    num_experts, choices, d_model, d_expert = SIZES[size]
    fc1 = torch.randn(1, 2 * d_expert, d_model, dtype=torch.bfloat16) * d_model**-0.5
    fc2 = torch.randn(1, d_model, d_expert, dtype=torch.bfloat16) * d_expert**-0.5
    one = ExpertWeights(fc1, fc2)
    formats = {name: copies(make(one), num_experts) for name, make in FORMATS.items()}
    print(f"\n{size}: {num_experts} experts, {choices} a token, D {d_model}, F {d_expert}")
    found = []
    for tokens in TOKENS:
        x_TD = torch.randn(tokens, d_model, dtype=torch.bfloat16)
        weights_TK = torch.rand(tokens, choices)
        times: dict[str, list[float]] = {name: [] for name in formats}
        for _ in range(ROUNDS[tokens] + 1):
            # Others in each round, so that small batches do not find their weights in the cache.
            ids_TK = torch.stack([torch.randperm(num_experts)[:choices] for _ in range(tokens)])
            for name, weights in formats.items():
                start = time.perf_counter()
                expert_mlp(x_TD, ids_TK, weights_TK, weights, "cpp")
                times[name].append(time.perf_counter() - start)
        medians = {name: median(seconds[1:]) for name, seconds in times.items()}
        fastest = {name: min(seconds[1:]) for name, seconds in times.items()}
        for name, seconds in medians.items():
            found.append(
                {
                    "size": size,
                    "tokens": tokens,
                    "format": name,
                    "bytes of an expert": bytes_of(formats[name]) / num_experts,
                    "ms": seconds * 1e3,
                    "times bf16": medians["bf16"] / seconds,
                    "fastest ms": fastest[name] * 1e3,
                    "fastest, times bf16": fastest["bf16"] / fastest[name],
                }
            )
        print(
            f"T {tokens:4}: "
            + "  ".join(
                f"{name} {seconds * 1e3:.3f} ms, fastest {fastest[name] * 1e3:.3f}"
                for name, seconds in medians.items()
            ),
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
