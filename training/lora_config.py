"""The ``lora`` section of a run, and what it asks of the model."""

from pydantic import Field

from ..moe.config.model import ModelConfig
from ..moe.models.lora import LoraTarget
from ..moe.models.lora_experts import LoraMixture, Weighting
from .section import Section


class LoraConfig(Section):
    """Low-rank updates ``W + alpha / rank * B A`` of frozen weights (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """Updates are multiplied by ``alpha / rank``."""
    targets: tuple[LoraTarget, ...] = Field(default=("attention", "experts"), min_length=1)
    """``attention``: all its projections. ``mlp``: gate, up and down of dense layers. ``experts``:
    gate, up and down of the routed experts."""
    experts: int = Field(default=0, ge=0)
    """LoRA experts of each dense MLP (LLaVA-MoLE): a router chooses one of so many updates for a
    token. 0 = one update for all tokens."""
    weighting: Weighting = "none"
    """``none``: the chosen update counts whole, and the router of LoRA experts learns from the
    balance loss alone (the paper). ``probability``: the update is multiplied by its probability,
    so the router learns from the task, too."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the balance loss of LoRA experts; at perfect balance the loss itself is 1."""

    @property
    def mixture(self) -> LoraMixture | None:
        """What ``mlp`` gets: LoRA experts, or None for one update for all tokens."""
        if not self.experts:
            return None
        return LoraMixture(self.experts, self.weighting, self.balance_loss)


def problem_with_lora(lora: LoraConfig, model: ModelConfig) -> str | None:
    """Return why a model cannot have these updates, or None."""
    moe = model.moe
    if "experts" in lora.targets:
        if moe is None:
            return "lora.targets has experts, but the model has none; use [attention, mlp]."
        if moe.router.reads_gates:
            return (
                f"lora.targets has experts, but {moe.router.kind} routers read the experts' "
                "weights without low-rank updates; use [attention]."
            )
    if "mlp" in lora.targets and len(model.moe_layers) == model.num_layers:
        return (
            "lora.targets has mlp, but all layers of the model are MoE layers; use experts in "
            "place of mlp."
        )
    return _problem_with_mixture(lora, model) if lora.experts else None


def _problem_with_mixture(lora: LoraConfig, model: ModelConfig) -> str | None:
    given = f"lora.experts is {lora.experts}"
    if lora.experts == 1:
        return f"{given}, which leaves nothing to choose; use 2 or more, or 0 for plain updates."
    if "mlp" not in lora.targets:
        return f"{given}, but lora.targets has no mlp to give them to; add mlp to lora.targets."
    if model.moe is not None:
        return (
            f"{given}, but the model has MoE layers, and LoRA experts are for models without; set "
            "lora.experts to 0."
        )
    return None
