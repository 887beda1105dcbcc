"""The learned top-k router: softmax or sigmoid scores, expert groups, a balancing bias.

T tokens, D model width, E experts, K choices, G groups of experts, B sequences.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule, scores
from ...kernels.values.memory import to_device
from .balancing_bias import add_margins, even_bias, problem_with_quantiles, toward_even_load
from .capacity import LimitedConfig, apply_capacity
from .entropy import add_entropy, mean_entropy
from .given import fill_places
from .linear import LinearRouter, project, route_in_one_call
from .loss_terms import GlobalCounts, LayerLosses, balance_and_z
from .router import RouterSizes
from .routing import RouterInput, Routing, routing_of
from .sequence_balance import add_sequence_balance, mean_sequence_balance
from .token_rounding import replay_rounding, round_tokens

TRAINING_ONLY = (
    *("bias_update_rate", "bias_update", "balance_loss", "balance_over", "sequence_balance_loss"),
    *("z_loss", "entropy_loss", "jitter", "capacity", "round_rows_to"),
)
"""Fields of :class:`TopK` that a run may change: they do not change the meaning of weights."""


class TopK(LimitedConfig):
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
    """Balance without a loss (Wang et al. 2024; DeepSeek-V3; ERNIE 4.5): experts are chosen by
    score plus a bias, which moves towards underloaded experts after each step. The bias does not
    change weights. None = no bias, 0 = a fixed bias. Set ``balance_loss: 0`` with it."""
    bias_update: Literal["sign", "quantile"] = "sign"
    """How the bias moves. ``sign``: by ``bias_update_rate`` (DeepSeek-V3: 0.001). ``quantile``: by
    this part of its way to the bias with which each expert would have got its even share
    (Megatron's quantile balancing: 1). It adds 512 counts for each expert."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    balance_over: Literal["layer", "model"] = "layer"
    """``layer``: a balance loss for each layer, summed (Switch, Megatron). ``model``: one loss
    over the pooled counts and probabilities of all layers (transformers). At perfect balance
    ``model`` is 1 in total, and ``layer`` 1 per layer. transformers does not divide by k: its
    ``router_aux_loss_coef`` times k is the ``balance_loss`` of ``model``."""
    sequence_balance_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the same loss over each sequence (DeepSeek-V3, 1e-4)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""
    entropy_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the mean entropy of a token's scores: makes tokens sure of their experts."""
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
        if self.round_rows_to and self.capacity is not None:
            raise ValueError(
                f"round_rows_to is {self.round_rows_to}, but there is a capacity, and both change "
                "how many rows an expert gets; set round_rows_to: 0 or capacity: null."
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
        if self.bias_update == "quantile":
            rate = self.bias_update_rate
            return problem_with_quantiles(rate, self.k, self.num_groups, num_experts)
        return None

    def pools_layers(self) -> bool:
        """Return whether the balance loss is taken over the model."""
        return self.balance_over == "model" and self.balance_loss > 0

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

    replays: ClassVar[bool] = True
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
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        bias_E, given_TK = self.e_score_correction_bias, router_input.given_TK
        if not self.training:
            weights = (self.weight, self.bias, bias_E)
            found = route_in_one_call(x_TD, *weights, valid_T, self.rule, given_TK)
            if found is not None:
                return found
        logits_TE = self.logits(x_TD)
        if given_TK is not None and self.training:
            given_TK = self._before_drops(given_TK, logits_TE, valid_T)
        choices = choose(logits_TE, bias_E, valid_T, self.rule, self.training, given_TK=given_TK)
        routing = routing_of(choices, valid_T)
        if not self.training:
            return routing
        if self.config.sequence_balance_loss:
            add_sequence_balance(routing, logits_TE, router_input, self.rule)
        if self.config.entropy_loss:
            add_entropy(routing, logits_TE, valid_T, self.rule)
        if bias_E is not None and self.config.bias_update == "quantile":
            add_margins(routing, scores(logits_TE, self.rule), bias_E, self.k, valid_T)
        if self.config.capacity is not None:
            scores_TE = scores(logits_TE, self.rule)
            apply_capacity(routing, scores_TE, self.config.capacity, router_input)
        if self.config.round_rows_to:
            self._round(routing, scores(logits_TE, self.rule), router_input.given_TK)
        return routing

    def _before_drops(self, given_TK: Tensor, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Return recorded choices before capacity or rounding took some of them away."""
        if self.config.capacity is None and not self.config.round_rows_to:
            return given_TK
        if self.config.round_rows_to:
            given_TK = given_TK[:, : self.k]  # the columns behind them were added
        own = choose(logits_TE, self.e_score_correction_bias, valid_T, self.rule, wants_sums=False)
        return fill_places(given_TK, own.experts_TK, self.k)

    def _round(self, routing: Routing, scores_TE: Tensor, given_TX: Tensor | None) -> None:
        """Round the rows of each expert, or replay how they were rounded."""
        choices = (routing.experts_TK, routing.weights_TK, scores_TE)
        if given_TX is None:
            found = round_tokens(*choices, self.config.round_rows_to)
        else:
            found = replay_rounding(*choices, given_TX)
        routing.experts_TK, routing.weights_TK = found

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return balance, z, sequence balance and entropy; see :class:`TopK`.

        Balance over sequences is its mean over the sequences of the global batch.
        """
        config = self.config
        found = balance_and_z(
            routing, counts, self.k, config.balance_loss, config.z_loss, config.balance_over
        )
        terms = list(found.terms)
        if config.sequence_balance_loss:
            terms.append(config.sequence_balance_loss * mean_sequence_balance(routing, counts))
        if config.entropy_loss:
            terms.append(config.entropy_loss * mean_entropy(routing, counts))
        return found._replace(terms=tuple(terms))

    @torch.no_grad()
    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Move the bias, if there is one, as ``bias_update`` says."""
        bias_E, rate = self.e_score_correction_bias, self.config.bias_update_rate
        if bias_E is None or not rate:
            return
        if self.config.bias_update == "sign":
            bias_E += rate * to_device(toward_even_load(counts).to(bias_E.dtype), bias_E.device)
        elif counts.num_tokens:
            even_E = even_bias(counts, self.k).to(bias_E.dtype)
            bias_E.lerp_(to_device(even_E, bias_E.device), rate)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return each row's score for every expert before softmax or sigmoid, ``[T, E]``."""
        if self.config.jitter and self.training:
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            x_TD = x_TD * (1 + self.config.jitter * (2 * torch.rand_like(x_TD) - 1))
        logits_TE = project(x_TD, self.weight)
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)
