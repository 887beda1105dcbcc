"""COMET: gates of decision trees (Ibrahim et al. 2023, "COMET: Learning Cardinality Constrained
Mixture of Experts with Trees and Local Search").

T tokens, D model width, K trees, E experts (leaves of a tree), N = E - 1 inner nodes of a tree.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from .linear import LearnedConfig, project
from .loss_terms import GlobalCounts, LayerLosses, training_sum
from .router import Router, RouterSizes
from .routing import RouterInput, Routing
from .smooth_step import entropy, routing_of_weights, smooth_step, uniform, valid_sum
from .variation import add_sums, variation_loss

LEAF_BOUND = 0.05
"""Leaf weights begin in U(-0.05, 0.05), as in the released code."""


class Comet(LearnedConfig):
    """k binary trees, each with a leaf for every expert (Ibrahim et al. 2023).

    A node goes left with probability ``v = S(w x + b)``, where S is a step of width ``gamma`` that
    reaches exactly 0 and 1. Leaf l of tree i has path probability ``p_il`` and score ``a_il``. The
    weight of expert l is ``sum_i`` of ``p_il exp(a_il)``, divided by its sum over all trees and
    leaves. At first the nodes are undecided, and a token visits all experts. Once all of a token's
    nodes are decided, each tree leads it to one leaf, so that it visits at most k experts. Only
    experts with a weight above zero are computed.
    """

    paper: ClassVar[str] = "Ibrahim et al. 2023 (COMET)"
    varies: ClassVar[bool] = True

    kind: Literal["comet"] = "comet"
    k: int = Field(default=2, ge=1)
    """Trees; a token visits at most this many experts once its nodes are decided."""
    gamma: float = Field(default=1.0, gt=0)
    """Width of the step: nodes are decided where ``|w x + b|`` exceeds half of it. The weights
    begin in proportion to it. If it is too small for the learning rate, the first steps decide all
    nodes, alike for all tokens. The paper tries 0.001 to 10."""
    entropy_loss: float = Field(default=0.05, ge=0)
    """Coefficient of the paths' entropy, a mean over tokens, summed over trees. It makes the nodes
    decide; without it the gate may stay dense. The paper tries 0.05 to 10."""
    importance_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the squared variation (variance / mean^2) of the experts' summed weights over
    the batch. The paper has none; without it a language model's tokens may all take the same k
    experts once they are decided."""

    def build(self, sizes: RouterSizes) -> "CometRouter":
        """Return the module."""
        return CometRouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but the losses' coefficients."""
        values = super().architecture()
        del values["entropy_loss"], values["importance_loss"]
        return values


class CometRouter(Router):
    """See :class:`Comet`. Nodes and leaves are numbered in heap order; E may be any number."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Comet, d_model: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.config: Comet = config
        num_nodes = config.k * (num_experts - 1)
        self.node_weight = nn.Parameter(torch.empty(num_nodes, d_model))
        self.node_bias = nn.Parameter(torch.empty(num_nodes))
        self.leaf_weight = nn.Parameter(torch.empty(config.k * num_experts, d_model))
        self.leaf_bias = nn.Parameter(torch.zeros(config.k * num_experts))
        for parameter in (self.node_weight, self.node_bias):
            nn.init.uniform_(parameter, -config.gamma / 100, config.gamma / 100)
        nn.init.uniform_(self.leaf_weight, -LEAF_BOUND, LEAF_BOUND)

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return nodes in U(-gamma/100, gamma/100) and leaf weights in U(-0.05, 0.05)."""
        parameter = self.get_parameter(name)
        if name == "leaf_bias":
            return None
        bound = LEAF_BOUND if name == "leaf_weight" else self.config.gamma / 100
        return uniform(parameter.shape, bound, generator)

    def route(self, router_input: RouterInput) -> Routing:
        """Send each row to all experts that its trees give a weight above zero."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        nodes = project(x_TD, self.node_weight)
        nodes_TKN = (nodes + self.node_bias.to(nodes.dtype)).unflatten(1, (self.k, -1))
        leaves = project(x_TD, self.leaf_weight)
        scores_TKE = (leaves + self.leaf_bias.to(leaves.dtype)).unflatten(1, (self.k, -1))
        log_paths_TKE = log_path_probabilities(smooth_step(nodes_TKN, self.config.gamma))
        weights = (scores_TKE + log_paths_TKE).flatten(1).softmax(dim=1)
        weights_TE = weights.unflatten(1, (self.k, -1)).sum(dim=1)
        routing = routing_of_weights(weights_TE, valid_T, router_input.given_TK)
        if self.training:
            entropy_T = entropy(log_paths_TKE.exp()).sum(dim=1)
            routing.extras["entropy_sum"] = valid_sum(entropy_T, valid_T)
            if self.config.importance_loss:
                add_sums(routing, "importance_E", weights_TE, valid_T)
        return routing

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return the paths' entropy, a mean over tokens, and the variation of importance."""
        mean = training_sum(routing, "entropy_sum") / counts.num_tokens.clamp(min=1)
        terms = [self.config.entropy_loss * mean]
        if self.config.importance_loss:
            importance = variation_loss(routing, counts, "importance_E")
            terms.append(self.config.importance_loss * importance)
        return LayerLosses(tuple(terms))


def log_path_probabilities(left_TKN: Tensor) -> Tensor:
    """Return the logarithm of the probability to reach each leaf, ``[T, K, N + 1]``.

    ``left_TKN`` are the nodes' probabilities of going left. The trees are heaps: node j has
    children 2j + 1 and 2j + 2, and those from N on are leaves. Unreachable leaves have -inf.
    """
    log_left_TKN, log_right_TKN = _log(left_TKN), _log(1 - left_TKN)
    num_nodes = left_TKN.shape[-1]
    level = left_TKN.new_zeros((*left_TKN.shape[:-1], 1))
    first, leaves = 0, level[..., :0]
    while first < num_nodes:  # level by level; only the last level but one has leaves and nodes
        width = level.shape[-1]
        inner = min(width, num_nodes - first)
        leaves, parents = level[..., inner:], level[..., :inner]
        left = parents + log_left_TKN[..., first : first + inner]
        right = parents + log_right_TKN[..., first : first + inner]
        level = torch.stack((left, right), dim=-1).flatten(-2)
        first += width
    return torch.cat((leaves, level), dim=-1)


def _log(values: Tensor) -> Tensor:
    """Return the logarithm, whose gradient is zero where the value is."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1).log(), -torch.inf)
