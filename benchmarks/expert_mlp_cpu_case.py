"""One size of an expert MLP on a CPU, with its inputs. T tokens, K choices, D model width."""

from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.kernels.values.expert_weights import ExpertWeights


class Layer(NamedTuple):
    """The expert MLP of a model."""

    num_experts: int
    num_choices: int
    d_model: int
    d_expert: int


class Case:
    """One size of a layer, with its inputs and the routing of the round."""

    def __init__(self, layer: Layer, experts: ExpertWeights, num_tokens: int) -> None:
        self.layer, self.experts = layer, experts
        self._generator = torch.Generator().manual_seed(num_tokens)
        dtype = experts.fc1_SHD.dtype
        size = (num_tokens, layer.d_model)
        self.x_TD = torch.randn(size, generator=self._generator).to(dtype).requires_grad_()
        self.upstream_TD = torch.randn(size, generator=self._generator).to(dtype)
        self.num_rows = num_tokens * layer.num_choices
        self.use(self.routing())

    def routing(self) -> tuple[Tensor, Tensor]:
        """Draw experts and weights."""
        size = (self.x_TD.shape[0], self.layer.num_experts)
        scores_TE = torch.randn(size, generator=self._generator)
        weights_TK, experts_TK = scores_TE.topk(self.layer.num_choices)
        return experts_TK, weights_TK.softmax(dim=-1).requires_grad_()

    def use(self, routing: tuple[Tensor, Tensor]) -> None:
        """Use this routing from now on."""
        self.experts_TK, self.weights_TK = routing

    @property
    def counts_E(self) -> list[int]:
        """Rows of each expert."""
        ids_R = self.experts_TK.flatten()
        return torch.bincount(ids_R, minlength=self.layer.num_experts).tolist()

    def weight_bytes(self, bits: float) -> float:
        """Bytes of the chosen experts."""
        active = sum(count > 0 for count in self.counts_E)
        return active * 3 * self.layer.d_model * self.layer.d_expert * bits / 8
