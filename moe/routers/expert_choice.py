"""Routers whose experts choose tokens (Zhou et al. 2022), or where both choose each other.

T tokens of a sequence, D model width, E experts, N rows of all sequences.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .groups import valid_rows
from .linear import LearnedConfig, LinearRouter, Stepped
from .loss_terms import GlobalCounts
from .router import RouterSizes
from .routing import RouterInput, Routing
from .smooth_step import routing_of_weights
from .whole_batch import from_fixed_point, to_fixed_point

STEPS = 2.0**16
"""Steps of the logarithm of a score, when scores are compared."""


class ExpertChoice(LearnedConfig):
    """In each sequence every expert takes its best ``ceil(k T / E)`` tokens (Zhou et al. 2022).

    So the load is even by construction and needs no loss. A token may get no expert, or all. With
    ``choice: mutual`` the ``k T`` largest of all scores win, whatever their token or expert
    (Ayonrinde 2024). Weights are the scores, not divided by their sum. Training looks at later
    tokens of the sequence. For a language model evaluation must not: each expert then takes every
    token whose score exceeds a threshold, which training learns.
    """

    paper: ClassVar[str] = "Zhou et al. 2022; Ayonrinde 2024 (mutual choice)"
    varies: ClassVar[bool] = True

    kind: Literal["expert_choice"] = "expert_choice"
    k: int = Field(default=2, ge=1)
    """Mean number of experts of a token (the paper's capacity factor)."""
    choice: Literal["expert", "mutual"] = "expert"
    """``expert``: each expert takes the same number of tokens. ``mutual``: one budget for all."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores; softmax is over the experts."""
    evaluation: Literal["threshold", "group"] = "threshold"
    """``threshold``: choose token by token with the running thresholds, so that the model can
    continue a text. ``group``: choose over whole sequences as in training; the model cannot
    continue a text."""
    threshold_rate: float = Field(default=0.01, gt=0, le=1)
    """Thresholds move by this part of the way, each step, to the mean over the batch's sequences
    of the smallest score that was chosen. The first step sets them."""

    def build(self, sizes: RouterSizes) -> "ExpertChoiceRouter":
        """Return the module."""
        return ExpertChoiceRouter(self, sizes.d_model, sizes.num_experts)

    def why_not_causal(self) -> str | None:
        """Return that groups hold later tokens, unless evaluation takes thresholds."""
        if self.evaluation == "threshold":
            return None
        return (
            "router.evaluation is group, which chooses among all tokens of a sequence; train with "
            "router.evaluation=threshold."
        )

    def most_rows(self, num_tokens: int, num_experts: int) -> int | None:
        """Return what each expert takes; with mutual choice there is no limit."""
        return None if self.choice == "mutual" else rows_each(num_tokens, self.k, num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but ``threshold_rate``."""
        values = super().architecture()
        del values["threshold_rate"]
        return values


class ExpertChoiceRouter(Stepped, LinearRouter):
    """See :class:`ExpertChoice`.

    In a replay the thresholds follow the router's own choice.
    """

    replays: ClassVar[bool] = True
    threshold: Tensor
    """``[E]``, or ``[1]`` with mutual choice; fp32."""

    def __init__(self, config: ExpertChoice, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.config: ExpertChoice = config
        self.start_steps()
        size = 1 if config.choice == "mutual" else num_experts
        chance = 0.5 if config.score == "sigmoid" else 1 / num_experts
        self.register_buffer("threshold", torch.full((size,), chance))

    def route(self, router_input: RouterInput) -> Routing:
        """Choose over each sequence; token by token in evaluation with thresholds."""
        x_ND, valid_N = router_input.x_TD, router_input.valid_T
        assert x_ND is not None, "the caller must pass hidden rows"
        logits_NE = self.logits(x_ND)
        is_softmax = self.config.score == "softmax"
        logs_NE = logits_NE.log_softmax(dim=1) if is_softmax else F.logsigmoid(logits_NE)
        scores_NE = logs_NE.exp()
        if self.training or self.config.evaluation == "group":
            chosen_NE, smallest, num_groups = self._choose(logs_NE.detach(), router_input)
        else:
            chosen_NE = scores_NE > self.threshold.to(scores_NE.dtype)
        given_NK = router_input.given_TK
        if given_NK is None:
            scores_NE = torch.where(chosen_NE, scores_NE, 0)
        routing = routing_of_weights(scores_NE, valid_N, given_NK)
        if self.training:
            routing.extra_counts["smallest"] = smallest
            routing.extra_counts["num_groups"] = num_groups
        return routing

    def _choose(self, logs_NE: Tensor, router_input: RouterInput) -> tuple[Tensor, Tensor, Tensor]:
        """Return the choices; the sum over sequences of the smallest chosen score; how many."""
        chosen_NE = torch.zeros_like(logs_NE, dtype=torch.bool)
        smallest = torch.zeros_like(self.threshold, dtype=torch.int64)
        num_groups = 0
        for rows_T in valid_rows(router_input, len(logs_NE), logs_NE.device):
            logs_TE, num_groups = logs_NE[rows_T], num_groups + 1
            if self.config.choice == "mutual":
                chosen_TE, last = best_of_all(logs_TE, self.k * len(rows_T))
            else:
                capacity = rows_each(len(rows_T), self.k, self.num_experts)
                chosen_TE, last = best_of_columns(logs_TE, capacity)
            chosen_NE[rows_T] = chosen_TE
            # Each alone in fixed point, so that sums are the same on any ranks.
            smallest += to_fixed_point(last.exp())
        return chosen_NE, smallest, torch.tensor(num_groups, device=logs_NE.device)

    @torch.no_grad()
    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Move the thresholds."""
        num_groups = counts.extra["num_groups"].to(self.threshold.device)
        sums = from_fixed_point(counts.extra["smallest"], self.threshold.dtype).to(self.threshold)
        means = torch.where(num_groups > 0, sums / num_groups.clamp(min=1), self.threshold)
        rate = torch.where(self.step == 0, 1.0, self.config.threshold_rate)
        self.threshold.lerp_(means, rate.to(means.dtype))
        super().after_step(counts, layers)


def rows_each(num_tokens: int, k: int, num_experts: int) -> int:
    """Return how many tokens of a sequence each expert takes."""
    return -(-k * num_tokens // num_experts)


def best_of_columns(logs_TE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return the ``capacity`` largest of each column, and the smallest of those ``[E]``.

    Ties go to the earlier row. Logarithms of scores within 1.5e-5 are ties: the rows of a repeated
    token differ by rounding only, and must not be chosen by it.
    """
    order_TE = (logs_TE * STEPS).round().sort(dim=0, descending=True, stable=True).indices
    chosen_TE = torch.zeros_like(logs_TE, dtype=torch.bool)
    chosen_TE.scatter_(0, order_TE[:capacity], True)
    return chosen_TE, logs_TE.gather(0, order_TE[capacity - 1 : capacity])[0]


def best_of_all(logs_TE: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Return the ``budget`` largest of all, and the smallest of those ``[1]``.

    Ties go to the earlier row, and within a row to the earlier expert.
    """
    chosen, last = best_of_columns(logs_TE.reshape(-1, 1), budget)
    return chosen.view_as(logs_TE), last
