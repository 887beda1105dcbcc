"""The learned top-k router: softmax or sigmoid scores, expert groups, a balancing bias.

T tokens, D model width, E experts, K choices, G groups of experts, B sequences.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.router import choose, project_and_choose, weigh
from ...kernels.values.choice import ChoiceRule, scores
from .linear import LearnedConfig, LinearRouter, project
from .loss_terms import BalanceSums, GlobalCounts, LayerLosses
from .router import RouterSizes
from .routing import RouterInput, Routing, count_tokens
from .sequence_balance import add_sequence_balance
from .token_rounding import round_tokens

TRAINING_ONLY = (
    "bias_update_rate",
    "balance_loss",
    "balance_over",
    "sequence_balance_loss",
    "z_loss",
    "jitter",
    "round_rows_to",
)
"""Fields of :class:`TopK` that a run may change: they do not change the meaning of weights."""


class TopK(LearnedConfig):
    """Scores from a linear layer, the k largest win (Shazeer et al. 2017; Switch).

    With ``lookahead`` it is the router of Pre-gated MoE or SmallThinker. With ``score: sigmoid``,
    groups and ``bias_update_rate`` it is that of DeepSeek-V3.
    """

    paper: ClassVar[str] = "Shazeer et al. 2017; Switch; DeepSeek-V3; Pre-gated MoE; SmallThinker"

    kind: Literal["topk"] = "topk"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    renormalize: bool = True
    """Divide the chosen scores by their sum (Mixtral, released Qwen3-MoE checkpoints)."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on all weights (DeepSeek's ``routed_scaling_factor``)."""
    num_groups: int = Field(default=1, ge=1)
    """Number of groups of neighbouring experts; ``top_groups`` of them are open to a token."""
    group_score: Literal["top2", "max"] = "top2"
    """Rank a group by the sum of its two best scores (DeepSeek-V3) or by its best (DeepSeek-V2)."""
    logit_bias: bool = False
    """A learned bias on the logits (gpt-oss)."""
    top_groups: int = Field(default=1, ge=1)
    """Groups a token may choose experts from."""
    bias_update_rate: float | None = Field(default=None, ge=0)
    """Balance without a loss (Wang et al. 2024; DeepSeek-V3): experts are chosen by score plus a
    bias, which moves by this much towards underloaded experts after each step. The bias
    does not change weights. None = no bias, 0 = a fixed bias. Set ``balance_loss: 0`` with it."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    balance_over: Literal["layer", "model"] = "layer"
    """``layer``: a balance loss for each layer, summed (Switch, Megatron). ``model``: one loss
    over the pooled counts and probabilities of all layers (transformers). At perfect balance
    ``model`` is 1 in total, and ``layer`` 1 per layer."""
    sequence_balance_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the same loss over each sequence (DeepSeek-V3, 1e-4)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Training multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch). Each rank
    draws separately, so results depend on the number of ranks."""
    round_rows_to: int = Field(default=0, ge=0)
    """Training gives each expert a multiple of this many rows of a rank's tokens (SonicMoE's token
    rounding; 0 = off): 128 fills the tiles of GPU kernels where experts have a few hundred rows.
    Losses and statistics keep the router's own choice. Results depend on the number of ranks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups is {self.top_groups}, but num_groups is {self.num_groups}; raise "
                "num_groups or lower top_groups."
            )
        return self

    def build(self, sizes: RouterSizes) -> "TopKRouter":
        """Return the module."""
        return TopKRouter(self, sizes.d_model, sizes.num_experts)

    def problem_with(self, num_experts: int) -> str | None:
        """Return why k or these groups do not fit ``num_experts``, or None."""
        problem = super().problem_with(num_experts)
        if problem is not None:
            return problem
        if num_experts % self.num_groups:
            return (
                f"router.num_groups is {self.num_groups}, which does not divide the layer's "
                f"{num_experts} experts; use a divisor of {num_experts}."
            )
        within_reach = num_experts // self.num_groups * self.top_groups
        if self.k > within_reach:
            return (
                f"router.k is {self.k}, but top_groups = {self.top_groups} of num_groups = "
                f"{self.num_groups} leave {within_reach} experts; raise top_groups or lower k."
            )
        return None

    def architecture(self) -> dict[str, Any]:
        """Return all but :data:`TRAINING_ONLY`, and whether there is a balancing bias."""
        values = super().architecture()
        values["has_bias"] = self.bias_update_rate is not None
        for name in TRAINING_ONLY:
            del values[name]
        if self.num_groups == 1:
            values["group_score"] = values["top_groups"] = None
        return values


class TopKRouter(LinearRouter):
    """See :class:`TopK`. Scores are computed in fp32 (fp64 for fp64 input) for any type of x."""

    e_score_correction_bias: Tensor | None
    """``[E]``: DeepSeek's name for the balancing bias."""

    def __init__(self, config: TopK, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.config: TopK = config
        self.rule = ChoiceRule(
            k=config.k,
            score=config.score,
            renormalize=config.renormalize,
            scale=config.scale,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            group_best=2 if config.group_score == "top2" else 1,
        )
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.logit_bias else None
        has_bias = config.bias_update_rate is not None
        bias_E = torch.zeros(num_experts) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k best experts of each row of ``x_TD``.

        Values that only losses need are left out in evaluation mode.
        """
        return self._route(router_input, None)

    def route_to(self, router_input: RouterInput, experts_TK: Tensor) -> Routing:
        """Visit the given experts, in whatever groups; rows are not rounded again."""
        return self._route(router_input, experts_TK)

    def _route(self, router_input: RouterInput, given_TK: Tensor | None) -> Routing:
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        bias_E = self.e_score_correction_bias
        if not self.training and valid_T is None:
            weights = (self.weight, self.bias, bias_E)
            found = project_and_choose(x_TD, *weights, self.rule, given_TK)
            if found is not None:
                return Routing(*found[:3], num_tokens=torch.tensor(x_TD.shape[0]))
        logits_TE = self.logits(x_TD)
        if given_TK is None:
            choices = choose(logits_TE, bias_E, valid_T, self.rule, wants_sums=self.training)
        else:
            choices = weigh(logits_TE, given_TK, valid_T, self.rule, wants_sums=self.training)
        routing = Routing(
            experts_TK=choices.experts_TK,
            weights_TK=choices.weights_TK,
            counts_E=choices.counts_E,
            num_tokens=count_tokens(valid_T, choices.experts_TK),
        )
        if choices.sums is not None:
            routing.extras = choices.sums._asdict()
        if self.training and self.config.sequence_balance_loss:
            add_sequence_balance(routing, logits_TE, router_input, self.rule)
        if self.training and self.config.round_rows_to and given_TK is None:
            routing.experts_TK, routing.weights_TK = round_tokens(
                routing.experts_TK,
                routing.weights_TK,
                scores(logits_TE, self.rule),
                self.config.round_rows_to,
            )
        return routing

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return balance, sequence balance and z; see :class:`TopK`.

        z is ``1/T * sum_t logsumexp(logits_t)^2`` (ST-MoE eq. 5). Balance over sequences is its
        mean over the sequences of the global batch.
        """
        config, extras = self.config, routing.extras
        if "probability_sums_E" not in extras:
            raise ConfigError(
                "the routing has no sums for losses, which routers keep in training mode only; "
                "call train() on the layer before its forward."
            )
        sums = BalanceSums(
            num_experts=self.num_experts,
            k=self.k,
            counts_E=counts.counts_E,
            probability_sums_E=extras["probability_sums_E"],
            num_tokens=counts.num_tokens,
        )
        balance = sums.loss()
        z = extras["z_sum"] / counts.num_tokens.clamp(min=1)
        terms, pooled = [], None
        if config.balance_over == "layer":
            terms.append(config.balance_loss * balance)
        else:
            pooled = (config.balance_loss, sums)
        terms.append(config.z_loss * z)
        if "sequence_balance_sum" in extras:
            num_sequences = counts.extra["num_sequences"].clamp(min=1)
            per_sequence = extras["sequence_balance_sum"] / num_sequences
            terms.append(config.sequence_balance_loss * per_sequence)
        return LayerLosses(tuple(terms), pooled, balance, z)

    @torch.no_grad()
    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Move the bias towards even load.

        ``b += rate * sign(mean - load)`` (Wang et al. 2024, algorithm 1). Does nothing without a
        bias.
        """
        bias_E, rate = self.e_score_correction_bias, self.config.bias_update_rate
        if bias_E is not None and rate:
            load_E = counts.counts_E.to(bias_E)
            bias_E += rate * (load_E.mean() - load_E).sign()

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return each row's score for every expert before softmax or sigmoid, ``[T, E]``."""
        if self.config.jitter and self.training:
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            x_TD = x_TD * (1 + self.config.jitter * (2 * torch.rand_like(x_TD) - 1))
        logits_TE = project(x_TD, self.weight)
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)
