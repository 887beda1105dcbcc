"""The MoE layers of a model: the ``model.moe`` section."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...kernels.values.activation import Activation, fc1_parts
from ..blocks.residual import Residual
from ..blocks.table import AnyBlock
from ..routers.table import AnyRouter
from ..routers.topk import TopK

WIDEST = 1 << 24
"""Largest width, and largest vocabulary."""
MOST_EXPERTS = 1 << 16
"""Experts of a layer. Absurd values, for example from a damaged file, are refused before any
allocation."""


class MoEConfig(BaseModel):
    """The MoE layers of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_experts: int = Field(ge=1, le=MOST_EXPERTS)
    """Routed experts per layer."""
    d_expert: int = Field(ge=1, le=WIDEST)
    """Inner width of one expert."""
    d_shared: int = Field(default=0, ge=0, le=WIDEST)
    """Inner width of the shared expert; 0 = none."""
    shared_gate: bool = False
    """Multiply the shared expert by ``sigmoid(w x)`` (Qwen2-MoE)."""
    expert_bias: bool = False
    """Biases on the routed experts' projections (gpt-oss)."""
    activation: Activation = "swiglu"
    """Activation of routed and shared experts; ``relu`` and ``gelu`` have no gate. A decoder's
    dense layers are SwiGLU."""
    router: AnyRouter = TopK()
    """How tokens choose experts."""
    block: AnyBlock = Residual()
    """How the experts' output joins the residual stream."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = self.router.problem_with(self.num_experts)
        problem = problem or self.router.problem_with_activation(self.activation)
        if problem is not None:
            raise ValueError(problem)
        if self.shared_gate and not self.d_shared:
            raise ValueError("shared_gate is set, but d_shared is 0; give it a width.")
        return self

    @property
    def fc1_parts(self) -> tuple[str, ...]:
        """What an expert's first matrix consists of: gate and up, or up alone."""
        return fc1_parts(self.activation)

    @property
    def fc1_rows(self) -> int:
        """Rows of an expert's first matrix."""
        return len(self.fc1_parts) * self.d_expert

    @property
    def matrices(self) -> int:
        """Matrices of ``d_expert x d_model`` in an expert: three, or two without a gate."""
        return len(self.fc1_parts) + 1
