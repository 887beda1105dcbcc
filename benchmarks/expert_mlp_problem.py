"""One size of an expert MLP on a GPU, with its inputs. T tokens, K choices, D model width."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.kernels.experts import Backend, expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads


class Layer(NamedTuple):
    """The expert MLP of a model."""

    num_experts: int
    num_choices: int
    d_model: int
    d_expert: int


class Problem:
    """Inputs of one size; weights are shared by the sizes of a layer."""

    def __init__(self, layer: Layer, fc1_EHD: Tensor, fc2_EDF: Tensor, num_tokens: int) -> None:
        device, dtype = fc1_EHD.device, fc1_EHD.dtype
        generator = torch.Generator(device).manual_seed(num_tokens)

        def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        self.x_TD = random(num_tokens, layer.d_model).requires_grad_()
        scores_TE = random(num_tokens, layer.num_experts, dtype=torch.float32)
        weights_TK, self.experts_TK = scores_TE.topk(layer.num_choices)
        self.weights_TK = weights_TK.softmax(dim=-1).requires_grad_()
        self.upstream_TD = random(num_tokens, layer.d_model)
        self.fc1_EHD, self.fc2_EDF = fc1_EHD, fc2_EDF
        self.num_rows = num_tokens * layer.num_choices
        self.forward_flops = 6 * self.num_rows * layer.d_model * layer.d_expert

    def run(
        self, backend: Backend, main_grads: MainGrads | None = None, recompute: bool = False
    ) -> Tensor:
        """Compute y with one of our backends."""
        weights = ExpertWeights(self.fc1_EHD, self.fc2_EDF, main_grads=main_grads)
        arguments = (self.x_TD, self.experts_TK, self.weights_TK, weights, backend)
        return expert_mlp(*arguments, recompute=recompute)

    def gradients(self, y_TD: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x, the routing weights and the parameters."""
        leaves = (self.x_TD, self.weights_TK, *parameters)
        return torch.autograd.grad(y_TD, leaves, self.upstream_TD)

    def dense(self, has_backward: bool) -> Callable[[], None]:
        """Return only the products of the same FLOPs, through one expert."""
        fc1_HD, fc2_DF = self.fc1_EHD[0].detach(), self.fc2_EDF[0].detach()
        x_RD = self.x_TD.detach().repeat(self.num_rows // self.x_TD.shape[0], 1)
        a_RF, h_RH = (x_RD.new_ones(self.num_rows, n) for n in (fc2_DF.shape[1], fc1_HD.shape[0]))

        def forward() -> None:
            x_RD @ fc1_HD.t()
            a_RF @ fc2_DF.t()

        def both() -> None:
            forward()
            x_RD @ fc2_DF
            x_RD.t() @ a_RF
            h_RH @ fc1_HD
            h_RH.t() @ x_RD

        return both if has_backward else forward
