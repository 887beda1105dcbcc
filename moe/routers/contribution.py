"""The router of dense layers cut into experts: it predicts how much each expert will contribute.

T tokens, D model width, H width of the router, E experts.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .linear import project
from .router import Router, RouterConfig, RouterSizes
from .routing import RouterInput, Routing
from .smooth_step import routing_of_weights

Rule = Literal["max", "share"]


class Contribution(RouterConfig):
    """A token visits every expert whose output is predicted to matter (DSTI, D2DMoE).

    The experts are the neurons of a dense MLP, cut into equal parts. A small MLP without biases,
    ``R = |W2 relu(W1 x)|``, predicts the norm of each expert's output. The outputs of the experts
    that run are summed: all weights are 1. So with all experts running the layer is the dense MLP,
    up to the order in which its neurons are summed.

    Easy tokens visit few experts, and every token visits one or more. ``moeyard sparsify`` cuts a
    dense model and regresses this router. Training does not change it: no gradient reaches a choice
    of 0 or 1. ``k`` is the width of lines of choices, best about the mean of a token's experts.
    """

    paper: ClassVar[str] = "Piorczynski et al. 2023 (DSTI), Szatkowski et al. 2024 (D2DMoE)"
    learns: ClassVar[bool] = False  # but by moeyard sparsify
    varies: ClassVar[bool] = True

    kind: Literal["contribution"] = "contribution"
    rule: Rule = "max"
    """Which experts run. ``max`` (D2DMoE): those whose R is ``tau`` times the largest or more, so
    that 0 runs all. ``share`` (DSTI): the fewest, largest first, whose R together reach ``tau`` of
    their sum, so that 1 runs all."""
    tau: float = Field(default=0.0, ge=0, le=1)
    """The threshold of ``rule``. For ``max`` it is the paper's tau; its released code takes 1 minus
    that."""
    width: int = Field(default=128, ge=1, le=1 << 16)
    """Hidden width of the router."""

    def build(self, sizes: RouterSizes) -> "ContributionRouter":
        """Return the module."""
        return ContributionRouter(self, sizes)


class ContributionRouter(Router):
    """See :class:`Contribution`. Its matrices are buffers, drawn by the layer's number at first."""

    replays: ClassVar[bool] = True
    hidden_HD: Tensor
    """fp32: W1."""
    norm_EH: Tensor
    """fp32: W2."""

    def __init__(self, config: Contribution, sizes: RouterSizes) -> None:
        super().__init__(config, sizes.num_experts)
        self.config: Contribution = config
        hidden_HD, norm_EH = first_matrices(
            config.width, sizes.d_model, sizes.num_experts, sizes.layer
        )
        self.register_buffer("hidden_HD", hidden_HD)
        self.register_buffer("norm_EH", norm_EH)

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the experts of each row of ``x_TD``, in the order of their ids.

        Waits for the device, because the most choices of a token depend on the rows.
        """
        x_TD = router_input.x_TD
        assert x_TD is not None, "the caller must pass hidden rows"
        norms_TE = predicted_norms(x_TD, self.hidden_HD, self.norm_EH)
        if router_input.given_TK is None:
            weights_TE = chosen(norms_TE, self.config.rule, self.config.tau).to(norms_TE.dtype)
        else:
            weights_TE = torch.ones_like(norms_TE)
        return routing_of_weights(weights_TE, router_input.valid_T, router_input.given_TK)


def first_matrices(width: int, d_model: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw W1 ``[H, D]`` and W2 ``[E, H]`` in fp32, with std ``fan_in**-0.5``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = ((width, d_model), (num_experts, width))
    drawn = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    hidden_HD, norm_EH = (matrix * matrix.shape[1] ** -0.5 for matrix in drawn)
    return hidden_HD, norm_EH


def predicted_norms(x_TD: Tensor, hidden_HD: Tensor, norm_EH: Tensor) -> Tensor:
    """Return the predicted norm of each expert's output, ``[T, E]``, in fp32 or fp64."""
    return project(project(x_TD, hidden_HD).relu(), norm_EH).abs()


def chosen(norms_TE: Tensor, rule: Rule, tau: float) -> Tensor:
    """Return which experts run, bool ``[T, E]``: at least one of each row."""
    if rule == "max":
        return norms_TE >= tau * norms_TE.amax(dim=1, keepdim=True)
    if tau == 1:  # sums may reach the whole before the smallest experts
        return torch.ones_like(norms_TE, dtype=torch.bool)
    sorted_TE, ids_TE = norms_TE.sort(dim=1, descending=True, stable=True)
    sums_TE = sorted_TE.cumsum(dim=1)
    before_TE = F.pad(sums_TE[:, :-1], (1, 0))
    runs_TE = before_TE < tau * sums_TE[:, -1:]
    runs_TE[:, 0] = True
    return torch.zeros_like(runs_TE).scatter(1, ids_TE, runs_TE)
