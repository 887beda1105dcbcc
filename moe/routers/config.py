"""The configurations of routers: what a ``router:`` section may say."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TRAINING_ONLY = (
    *("bias_update_rate", "balance_loss", "balance_over", "sequence_balance_loss", "z_loss"),
    *("jitter", "round_rows_to"),
)
"""Fields of :class:`TopK` that a run may change on the way: weights mean the same without them."""


class RouterConfig(BaseModel):
    """What all routers share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    k: int = Field(default=2, ge=1)
    """Experts each token visits."""


class TopK(RouterConfig):
    """Scores from a linear layer, the k largest win (Shazeer et al. 2017; Switch).

    With ``lookahead`` it is Pre-gated MoE's or SmallThinker's router; with ``score: sigmoid``,
    groups and ``bias_update_rate`` it is DeepSeek-V3's.
    """

    kind: Literal["topk"] = "topk"
    lookahead: Literal["ffn_input", "attention_input", "previous_block"] = "ffn_input"
    """What it reads. ``ffn_input``: what the experts read. ``attention_input``: the raw residual
    entering the layer (SmallThinker). ``previous_block``: what the experts of the MoE layer before
    read (Pre-gated MoE); the first MoE layer then reads ``ffn_input``."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    renormalize: bool = True
    """Divide the chosen scores by their sum (Mixtral, released Qwen3-MoE checkpoints)."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on all weights (DeepSeek's ``routed_scaling_factor``)."""
    num_groups: int = Field(default=1, ge=1)
    """Groups of neighbouring experts, each judged by the sum of its two best scores."""
    group_score: Literal["top2", "max"] = "top2"
    """By its two best scores' sum (DeepSeek-V3) or its best (DeepSeek-V2)."""
    logit_bias: bool = False
    """A learned bias on the logits (gpt-oss)."""
    top_groups: int = Field(default=1, ge=1)
    """Groups a token may choose experts from."""
    bias_update_rate: float | None = Field(default=None, ge=0)
    """Balance without a loss (Wang et al. 2024; DeepSeek-V3): experts are chosen by score plus a
    bias, which moves by this much towards underloaded experts after each step. Weights never see
    the bias. None = no bias, 0 = a bias that stays. Set ``balance_loss: 0`` beside it."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    balance_over: Literal["layer", "model"] = "layer"
    """``layer``: a balance loss for each layer, summed (Switch, Megatron). ``model``: one loss of
    all layers, whose counts and probabilities are pooled first (transformers). It is 1 in all
    where the other is 1 for each layer."""
    sequence_balance_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the same loss over each sequence (DeepSeek-V3, 1e-4)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Training multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch). The draws
    belong to a rank, so results then depend on the number of ranks."""
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

    def problem_with(self, num_experts: int) -> str | None:
        """Return why these groups do not fit ``num_experts``, or None."""
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


class Hash(RouterConfig):
    """A fixed table from token id to experts (Roller et al. 2021); nothing is learned."""

    kind: Literal["hash"] = "hash"
    k: int = Field(default=1, ge=1)
    """Experts each token visits; each weighs 1/k."""
    table: Literal["random", "balanced"] = "balanced"
    """random: experts drawn per token id. balanced: frequent ids first, each to the experts with
    the least traffic so far; needs token frequencies when training starts."""
    seed: int = 0
    """Seed of the table."""


AnyRouter = Annotated[TopK | Hash, Field(discriminator="kind")]


def problem_with_choices(config: TopK | Hash, num_experts: int) -> str | None:
    """Return why a router of ``config`` cannot choose among ``num_experts``, or None."""
    if config.k > num_experts:
        return (
            f"router.k is {config.k}, but the layer has {num_experts} experts; "
            f"use a value from 1 to {num_experts}."
        )
    return config.problem_with(num_experts) if isinstance(config, TopK) else None
