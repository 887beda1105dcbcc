"""What the ``optimizer`` section of a training configuration has for every kind."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]

DECAY_SHARE = 0.1
"""Hu et al. 2024 find a decay over a tenth of the run enough."""


class OptimizerConfig(Section):
    """The learning rate over the run, and AdamW's options: every kind updates some with AdamW."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate after the warm-up."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the rate falls after the warm-up. ``cosine`` and ``linear`` fall from there to the last
    step. ``wsd`` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at ``lr`` and
    falls linearly over the last ``decay_share`` of the steps. Before it falls, the rate does not
    depend on ``train.steps``, so a run can go on with more steps as if it had them from the start.
    """
    decay_share: float | None = Field(default=None, gt=0, le=1)
    """Share of ``train.steps`` in which ``wsd`` falls; null is 0.1. Only with ``schedule: wsd``."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of ``lr``."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps in which the rate rises linearly to ``lr``."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """How much of its running means of the gradient and of its square Adam keeps each step."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of Adam's update."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices; never to norms or embeddings."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    shard_experts: bool = False
    """Let ranks that hold the same experts share out their master weights and state, and send each
    other the new weights after a step (ZeRO-1). Numbers and checkpoints are the same. There are
    ranks / (``ep`` * ``expert_tp``) such ranks; if that is 1, there is nothing to share out.
    ``parallel.dense: fsdp`` shares out dense parameters."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(
                f"decay_share is {self.decay_share:g}, but schedule is {self.schedule}, which has "
                "no such phase; set schedule to wsd or leave decay_share out."
            )
        return self
