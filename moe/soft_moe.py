"""Soft MoE (Puigcerver et al. 2024, "From Sparse to Soft Mixtures of Experts").

B groups, T tokens of a group, D model width, E experts, P slots of an expert, S = E * P slots.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.experts import Backend
from ..kernels.values.activation import Activation
from .experts.base import LayerExperts
from .experts.path import ExpertPath, LocalPath
from .experts.resident import Experts
from .routers.routing import Routing, count_choices

EPSILON = 1e-6
"""Added to sums of squares before their root (the released code)."""


class SoftMoE(nn.Module):
    """Experts that compute weighted means of tokens, in place of a choice of tokens.

    ``layer(x)`` takes ``[..., T, d_model]`` and returns the same shape. The T tokens are a group.
    A slot's input is a mean of the group's tokens, and a token's output a mean of all slots'
    outputs. The weights are softmaxes of ``scale * cos(x, mu)``, with a vector mu for each slot:
    over tokens on the way in, over slots on the way out. Every expert computes ``slots`` rows for
    each group, whatever its length, so the load is even and there is no auxiliary loss.

    Every token's output depends on all tokens of its group. So the layer is for encoders: a causal
    decoder cannot use it, and its output changes with the length of the group.

    Args:
        d_model: Width of a token.
        d_expert: Inner width of one expert.
        num_experts: Experts.
        slots: Slots of each expert. The paper uses about as many slots in all as tokens.
        activation: As for :class:`MoELayer`, like ``expert_ids``, ``backend`` and ``recompute``.

    Raises :class:`ConfigError` for sizes and inputs that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        slots: int = 1,
        activation: Activation = "swiglu",
        *,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_expert": d_expert, "num_experts": num_experts}
        for name, size in (sizes | {"slots": slots}).items():
            if type(size) is not int or size < 1:
                raise ConfigError(f"{name} is {size!r}; use a whole number from 1 upwards.")
        self.d_model, self.num_experts, self.slots = d_model, num_experts, slots
        self.mu_SD = nn.Parameter(torch.randn(num_experts * slots, d_model) * d_model**-0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.experts: LayerExperts = Experts(
            d_model, d_expert, num_experts, expert_ids, backend, activation, recompute
        )
        self.path: ExpertPath = LocalPath()
        """How slots get to their experts and back."""

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Return the layer's output.

        ``valid`` (bool, ``[..., T]``) is False for padding: it has no part in any slot, and its
        output is zero.
        """
        if x.ndim < 2 or x.shape[-1] != self.d_model:
            raise ConfigError(
                f"x has shape {list(x.shape)}, but d_model is {self.d_model}; give [..., T, "
                f"{self.d_model}]."
            )
        if valid is not None and valid.shape != x.shape[:-1]:
            raise ConfigError(
                f"valid has shape {list(valid.shape)} and x {list(x.shape)}; give "
                f"{list(x.shape[:-1])}, a value for each token."
            )
        x_BTD = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        valid_BT = x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool)
        if valid is not None:
            valid_BT = valid.reshape(valid_BT.shape)
        with torch.autocast(x.device.type, enabled=False):
            dispatch_BTS, combine_BTS = self.weights(x_BTD, valid_BT)
            mixed_BSD = dispatch_BTS.transpose(1, 2) @ x_BTD.to(dispatch_BTS.dtype)
        y_BSD = self._run_experts(mixed_BSD.to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            y_BTD = combine_BTS @ y_BSD.to(combine_BTS.dtype)
        return y_BTD.to(x.dtype).view_as(x)

    def weights(self, x_BTD: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights on the way in and on the way out, ``[B, T, S]``, in fp32 or fp64.

        The first add up to 1 over a group's tokens, the second over slots; both are 0 for rows that
        are not valid.
        """
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        directions_SD = self.scale.to(dtype) * _normalized(self.mu_SD.to(dtype))
        logits_BTS = _normalized(x_BTD.to(dtype)) @ directions_SD.T
        valid_BT1 = valid_BT.unsqueeze(-1)
        # Not -inf, whose softmax is not a number where a group has no valid rows.
        masked_BTS = logits_BTS.masked_fill(~valid_BT1, torch.finfo(dtype).min)
        dispatch_BTS = masked_BTS.softmax(dim=1) * valid_BT1
        return dispatch_BTS, logits_BTS.softmax(dim=2) * valid_BT1

    def _run_experts(self, mixed_BSD: Tensor) -> Tensor:
        """Return each slot's row after its expert."""
        rows_ND = mixed_BSD.flatten(0, 1)
        expert_S = torch.arange(self.num_experts, device=rows_ND.device)
        expert_S = expert_S.repeat_interleave(self.slots).int()
        experts_NK = expert_S.repeat(len(mixed_BSD)).unsqueeze(1)
        routing = Routing(
            experts_TK=experts_NK,
            weights_TK=torch.ones(experts_NK.shape, device=rows_ND.device),
            counts_E=count_choices(experts_NK, self.num_experts),
            num_tokens=torch.tensor(len(rows_ND), device=rows_ND.device),
        )
        return self.path.run(rows_ND, routing, self.experts).view_as(mixed_BSD)

    def extra_repr(self) -> str:
        """Show the layer's sizes."""
        return f"d_model={self.d_model}, num_experts={self.num_experts}, slots={self.slots}"


def _normalized(rows: Tensor) -> Tensor:
    return rows * (rows.square().sum(dim=-1, keepdim=True) + EPSILON).rsqrt()
