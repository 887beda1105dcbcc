"""The sparsity-aware router of MoE-X (Yang et al. 2025), for experts with a ReLU.

T tokens, D model width (one more where experts have biases), F expert width, E experts, K choices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...errors import ConfigError
from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule
from .linear import LearnedConfig, project
from .loss_terms import GlobalCounts, LayerLosses, balance_and_z
from .router import Router, RouterSizes
from .routing import RouterInput, Routing, routing_of


class Sparsity(LearnedConfig):
    """Tokens go to the experts that will have the fewest active units (MoE-X, Yang et al. 2025).

    There is no router matrix: scores follow from the weights in front of the experts' ReLU. Over
    an expert's F rows of them let ``mean`` and ``variance`` be those of each column. For a token x
    the values before the ReLU are about normal with mean ``m = x . mean`` and variance
    ``s^2 = x^2 . variance``, and biases add theirs. The share of positive ones is about
    ``(1 + erf(m / (sqrt(2) s))) / 2``. The logit is ``-erf(m / (sqrt(2) s))``, the k largest win,
    and their softmax is the weights. The losses' gradient reaches these weights through both
    statistics.

    The paper's experts are MLPs of two matrices, ``down(relu(up x))`` (``activation: relu``), and
    the layer is then one MLP of width E * F whose units outside the chosen experts are 0. Gated
    experts work too (``activation: reglu``): a unit is active where its gate is positive. Logits
    are within -1 and 1. Experts that are copies of each other, as upcycling makes them, have equal
    scores, so that nothing decides between them. Training reads all these weights in each forward,
    and again at the end of each step. Evaluation reads none: the statistics are saved with the
    router.
    """

    paper: ClassVar[str] = "Yang et al. 2025 (MoE-X)"
    learns: ClassVar[bool] = False  # its weights are the experts'
    reads_gates: ClassVar[bool] = True

    kind: Literal["sparsity"] = "sparsity"
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""

    def build(self, sizes: RouterSizes) -> "SparsityRouter":
        """Return the module."""
        return SparsityRouter(self, sizes)

    def problem_with_activation(self, activation: str) -> str | None:
        """Return why only units behind a ReLU can be counted, or None."""
        if activation in ("relu", "reglu"):
            return None
        return (
            f"activation is {activation}, whose units are never exactly 0, but router.kind is "
            "sparsity, which counts active units; set activation to relu or reglu."
        )

    def architecture(self) -> dict[str, Any]:
        """Return all but the coefficients of losses."""
        return self.model_dump(mode="json", exclude={"balance_loss", "z_loss"})

    def problem_with_tensor(self, name: str, tensor: Tensor, num_experts: int) -> str | None:
        """Return that statistics are not known, or None."""
        if bool(tensor.isfinite().all()):
            return None
        return (
            "is not finite, so the statistics of the experts are not known; call "
            "gate.experts_changed() on the layers of the model, and write the folder again"
        )


class SparsityRouter(Router):
    """See :class:`Sparsity`. The statistics of the last forward or step are buffers."""

    replays: ClassVar[bool] = True
    mean_ED: Tensor
    """fp32: means of the experts' rows before the ReLU, the bias last; NaN = not known yet."""
    variance_ED: Tensor
    """fp32: their variances."""

    def __init__(self, config: Sparsity, sizes: RouterSizes) -> None:
        super().__init__(config, sizes.num_experts)
        self.config: Sparsity = config
        self.rule = ChoiceRule(k=config.k)
        self._has_bias = sizes.expert_bias
        self._gate_statistics: Callable[[], Tensor | None] | None = None
        self._is_known = False
        """Whether the buffers were seen to have numbers; looking at them waits for the device."""
        shape = (sizes.num_experts, sizes.d_model + sizes.expert_bias)
        for name in ("mean_ED", "variance_ED"):
            self.register_buffer(name, torch.full(shape, math.nan, dtype=torch.float32))

    def watch(self, gate_statistics: Callable[[], Tensor | None]) -> None:
        """Keep where the statistics of now come from."""
        self._gate_statistics = gate_statistics

    @torch.no_grad()
    def experts_changed(self) -> None:
        """Remember the statistics of now, if they can be known here."""
        self._live()

    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Remember the statistics of the new weights."""
        self.experts_changed()

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k experts of each row of ``x_TD`` that will be the least active."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        choices = choose(
            -self.activity(x_TD),
            None,
            valid_T,
            self.rule,
            self.training,
            given_TK=router_input.given_TK,
        )
        return routing_of(choices, valid_T)

    def activity(self, x_TD: Tensor) -> Tensor:
        """Return ``erf(m / (sqrt(2) s))`` of each row and expert, ``[T, E]``, in fp32 or fp64.

        The share of an expert's units that are expected to be active is ``(1 + activity) / 2``.
        """
        mean_ED, variance_ED = self._statistics()
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if self._has_bias:
            x_TD = torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], dim=1)
        mean_TE = project(x_TD, mean_ED)
        variance_TE = project(x_TD.square(), variance_ED)
        # Without variance all units agree: a step, whose slope is 0.
        varies_TE = variance_TE > 0
        deviation_TE = torch.where(varies_TE, variance_TE, 1).sqrt()
        activity_TE = torch.erf(mean_TE / (math.sqrt(2) * deviation_TE))
        return torch.where(varies_TE, activity_TE, mean_TE.sign())

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return balance and z."""
        config = self.config
        return balance_and_z(routing, counts, self.k, config.balance_loss, config.z_loss)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return means and variances: in training those of now, otherwise those remembered."""
        live = self._live() if self.training or not self._knows() else None
        if live is not None:
            return live
        if not self._knows():
            raise ConfigError(
                "the sparsity router does not know its experts' weights; build it by MoELayer, and "
                "with experts on several ranks set the layer's path first."
            )
        return self.mean_ED, self.variance_ED

    def _live(self) -> tuple[Tensor, Tensor] | None:
        """Return the statistics of now, with gradient, and remember them; None = not known here."""
        found_E2D = None if self._gate_statistics is None else self._gate_statistics()
        if found_E2D is None:
            return None
        mean_ED, variance_ED = found_E2D.unbind(dim=1)
        with torch.no_grad():
            self.mean_ED.copy_(mean_ED)
            self.variance_ED.copy_(variance_ED)
        self._is_known = True
        return mean_ED, variance_ED

    def _knows(self) -> bool:
        if not self._is_known:
            self._is_known = bool(self.mean_ED.isfinite().all())
        return self._is_known
