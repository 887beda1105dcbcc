"""The expert MLP: one call, several backends.

T tokens, K choices, D model width.
"""

from typing import Literal

import torch
from torch import Tensor

from .cpu.training import CppExpertMLP, can_train
from .expert_weights import ExpertWeights
from .reference import expert_mlp_reference
from .torch_backend import ExpertMLP
from .waves import start_waves

Backend = Literal["torch", "reference"]


def expert_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    backend: Backend = "torch",
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]`` in x's dtype.

    ``experts_TK`` holds logical expert ids, -1 for no expert; ``weights_TK`` may be wider than x
    (fp32 beside bf16), and the sum over k runs in that type. Differentiable in x, the weights,
    fc1 and fc2. Raises ``ValueError`` for shapes that do not fit and ids out of range.
    """
    if experts_TK.shape != weights_TK.shape or x_TD.shape[:1] != experts_TK.shape[:1]:
        raise ValueError(
            f"x {tuple(x_TD.shape)}, experts {tuple(experts_TK.shape)} and weights "
            f"{tuple(weights_TK.shape)} do not fit; they must be [T, D], [T, K] and [T, K]."
        )
    if x_TD.shape[-1] != experts.fc1_SHD.shape[-1] or x_TD.dtype != experts.fc1_SHD.dtype:
        raise ValueError(
            f"x has width {x_TD.shape[-1]} and type {x_TD.dtype}, but the experts take "
            f"{experts.fc1_SHD.shape[-1]} and {experts.fc1_SHD.dtype}."
        )
    if backend == "reference":
        return expert_mlp_reference(x_TD, experts_TK, weights_TK, experts)
    if torch.is_grad_enabled():
        fc1_SHD, fc2_SDF = experts.fc1_SHD, experts.fc2_SDF
        mlp = CppExpertMLP if can_train(x_TD, experts) else ExpertMLP
        return mlp.apply(x_TD, experts_TK, weights_TK, fc1_SHD, fc2_SDF, experts)
    waves = start_waves(x_TD, experts_TK, weights_TK, experts.num_experts, experts)
    waves.add(experts)
    return waves.result()
