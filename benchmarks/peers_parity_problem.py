"""The problem that all systems of benchmarks/peers_parity.py solve, and its answer.

h = x + dense(x); z = h + moe(h); loss = mean((head(z) - target)^2). The MoE layer weighs the two
best experts by their softmax scores, divided by their sum, without a balance loss; experts are
SwiGLU. The first column of x is 1 and the first row of ``dense`` is 0, so that the first column of
the router's weight is a bias: the logarithm of the load's popularity (skew.py).

T tokens of all ranks, D model width, F expert width, E experts, O outputs.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skew import KINDS

K = 2
CLIP = 1.0
EPS = 1e-6
"""What torch and we add to the norm before dividing by it."""
MIN_GAP = 1e-4
"""Between logits of the second and the third expert, so that rounding changes no choice."""


def write_problem(path: Path, sizes: dict[str, int], loads: list[str], lr: float) -> dict:
    """Write rows, target and the weights for each load; return what was written."""
    torch.manual_seed(0)
    width, inner, experts = sizes["width"], sizes["inner"], sizes["experts"]
    x_TD = torch.randn(sizes["tokens"], width)
    x_TD[:, 0] = 1.0
    dense = torch.randn(width, width) * 0.5 * width**-0.5
    dense[0] = 0.0
    common = {
        "dense": dense,
        "head": torch.randn(sizes["outputs"], width) * width**-0.5,
        "gate": torch.randn(experts, inner, width) * width**-0.5,
        "up": torch.randn(experts, inner, width) * width**-0.5,
        "down": torch.randn(experts, width, inner) * inner**-0.5,
    }
    router = torch.randn(experts, width) * width**-0.5
    order_E = np.random.default_rng(0).permutation(experts)
    weights = {}
    for load in loads:
        popularity_E = np.empty(experts)
        popularity_E[order_E] = KINDS[load](0, experts)
        skewed = router.clone()
        skewed[:, 0] = torch.from_numpy(np.log(popularity_E)).float()
        weights[load] = {**common, "router": skewed}
    target_TO = 3 * torch.randn(sizes["tokens"], sizes["outputs"])
    found = {"sizes": sizes, "lr": lr, "x": x_TD, "target": target_TO, "weights": weights}
    torch.save(found, path)
    return found


def choose(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's experts ``[T, K]``, and the smallest gap to a choice that was not made."""
    h_TD = x_TD + x_TD @ weights["dense"].T
    best = (h_TD @ weights["router"].T).topk(K + 1, dim=1)
    return best.indices[:, :K], (best.values[:, K - 1] - best.values[:, K]).min()


def max_over_mean(problem: dict, load: str) -> float:
    """Return the rows of the fullest expert over the mean."""
    experts_TK, _ = choose(problem["weights"][load], problem["x"])
    counts_E = torch.bincount(experts_TK.flatten(), minlength=problem["sizes"]["experts"])
    return float(counts_E.max() / counts_E.double().mean())


def truth(problem: dict, load: str) -> dict:
    """Return loss, norm and gradient of one process in fp64, token by token, expert by expert.

    Also the factors that an update without and with clipping has.
    """
    weights = {n: w.double().requires_grad_() for n, w in problem["weights"][load].items()}
    x_TD, target_TO = problem["x"].double(), problem["target"].double()
    gap = choose({n: w.detach() for n, w in weights.items()}, x_TD)[1]
    assert gap > MIN_GAP, f"rounding could change a choice of load {load}: gap {gap}"
    total = torch.zeros((), dtype=torch.float64)
    for x_D, target_O in zip(x_TD, target_TO, strict=True):
        h_D = x_D + weights["dense"] @ x_D
        scores_E = torch.softmax(weights["router"] @ h_D, dim=0)
        best = scores_E.topk(K)
        z_D = h_D
        for score, expert in zip(best.values, best.indices.tolist(), strict=True):
            inner_F = F.silu(weights["gate"][expert] @ h_D) * (weights["up"][expert] @ h_D)
            z_D = z_D + score / best.values.sum() * (weights["down"][expert] @ inner_F)
        total = total + (weights["head"] @ z_D - target_O).square().sum()
    loss = total / target_TO.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = {n: w.grad for n, w in weights.items() if w.grad is not None}
    norm = float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())
    assert norm > CLIP, f"the norm of load {load} is {norm}: nothing would be clipped"
    return {
        "loss": float(loss.detach()),
        "norm": norm,
        "gradient": gradient,
        "unclipped_factor": 1.0,
        "clipped_factor": CLIP / (norm + EPS),
    }


def flops(sizes: dict[str, int]) -> int:
    """Return what a step must multiply and add: 6 for each weight that a token meets."""
    expert = 3 * sizes["width"] * sizes["inner"]
    dense = sizes["width"] * (sizes["width"] + sizes["outputs"] + sizes["experts"])
    return 6 * sizes["tokens"] * (K * expert + dense)
