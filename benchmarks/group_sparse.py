"""What does pruning half of the experts' groups cost, and what does it gain?

    python benchmarks/group_sparse.py speed --write
    python benchmarks/group_sparse.py loss MODEL_DIR CALIBRATION.txt HELD_OUT.txt... --write

Loss: the perplexity of a trained model on held-out texts, with its experts in bf16, int8, int4 and
group-sparse int4. Groups go by magnitude alone (plain), or by the mean square of their inputs
(diagonal: `moeyard convert --recovery none`); or what is left is fitted to make up for them (fit:
the default of `moeyard convert`). Seconds are those of all CPUs.
Speed: the experts alone, 2 threads, all formats in turn, medians; and the fastest round, which says
more on a machine that others use, too.

T tokens, E experts, D model width, F expert width.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.group_sparse import GroupSparseExpertWeights, GroupSparseMatrices
from moeyard.kernels.values.quantize import quantize_experts
from moeyard.kernels.values.quantized_weights import SlotWeights
from moeyard.kernels.values.sparsify import sparsify_experts
from moeyard.moe.experts.quantized import QuantizedExperts
from moeyard.moe.experts.resident import Experts
from moeyard.moe.folders.calibration import Calibration, calibrate, windows_of
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.group_sparse_format import GroupSparseFormat
from moeyard.moe.models.language_model import LanguageModel
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.loading import load
from moeyard.serving.pruning.recover import recover

from report import write_results

HELD_OUT_CHARACTERS = 10_000
"""Of each text."""
WINDOW = 512
SHARES = (0.25, 0.5)
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
    found = []
    for name in FORMATS:
        model = load(folder)
        for _, layer in model.decoder.moe_layers():
            weights = FORMATS[name](weights_of(layer.experts))
            if not isinstance(weights, ExpertWeights):
                layer.experts = QuantizedExperts(weights)
        found.append(measure(f"{name}, plain", model, texts))
    for share in SHARES:
        for way in ("diagonal", "fit"):
            model, seconds = recovered(folder, calibration, share, way)
            found.append(measure(f"int4_sparse {share:.0%}, {way}", model, texts, seconds))
    return found


def recovered(
    folder: Path, calibration: Path, share: float, way: str
) -> tuple[LanguageModel, float]:
    """Return the pruned model, and the CPU seconds that calibration and pruning took."""
    start = time.process_time()
    model, files, packed = load(folder), ModelFolder(folder), GroupSparseFormat(share)
    if way == "diagonal":
        known = calibrate(model, files, calibration)
        for index, layer in model.decoder.moe_layers():
            layer.experts = QuantizedExperts(by_importance(index, layer.experts, known, packed))
    else:
        windows = windows_of(model, calibration)
        done = recover(model.decoder, files, windows, packed)
        print(f"{done.num_plain} experts had too few rows")
    return model, time.process_time() - start


def by_importance(
    index: int, experts: Experts, known: Calibration, packed: GroupSparseFormat
) -> GroupSparseExpertWeights:
    matrices = []
    for weight_SQP, part in ((experts.fc1.data, "up"), (experts.fc2.data, "down")):
        kept = packed.kept(part, weight_SQP.shape[2])
        views = [known.pruned(index, e, part, w, kept) for e, w in enumerate(weight_SQP)]
        parts = (torch.stack(each) for each in zip(*views, strict=True))
        matrices.append(GroupSparseMatrices(*parts, weight_SQP.shape[2]))
    return GroupSparseExpertWeights(*matrices, activation=experts.activation)


def measure(name: str, model: LanguageModel, texts: list[Path], seconds: float = 0) -> dict:
    experts = model.decoder.moe_layers()[0][1].experts
    weights = weights_of(experts) if isinstance(experts, Experts) else experts.weights
    scores = [score_text(model, t.read_text()[:HELD_OUT_CHARACTERS], WINDOW) for t in texts]
    total = sum(s.loss * s.tokens for s in scores) / sum(s.tokens for s in scores)
    row = {
        "format": name,
        "bytes of an expert": bytes_of(weights) / weights.num_slots,
        "perplexity": math.exp(total),
        "by text": {t.name: s.perplexity for t, s in zip(texts, scores, strict=True)},
        "tokens": sum(s.tokens for s in scores),
        "CPU seconds of conversion": seconds,
    }
    by_text = ", ".join(f"{value:.3f}" for value in row["by text"].values())
    print(
        f"{name:28} {row['bytes of an expert']:9.0f} B  {row['perplexity']:.4f}  ({by_text})  "
        f"{seconds:.0f} s",
        flush=True,
    )
    return row


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
