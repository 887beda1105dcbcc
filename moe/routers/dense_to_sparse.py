"""Gates that begin dense and become sparse as their temperature falls (EvoMoE, Nie et al. 2021).

T tokens, D model width, E experts.
"""

import zlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from .draws import draw_rows
from .linear import LearnedConfig, LinearRouter, Stepped
from .loss_terms import BalanceSums, GlobalCounts, LayerLosses, kept
from .router import RouterSizes
from .routing import RouterInput, Routing
from .smooth_step import routing_of_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class DenseToSparse(LearnedConfig):
    """Gumbel-softmax with a falling temperature; experts above a threshold compute (EvoMoE).

    Training draws Gumbel noise n, and ``g = softmax((z + n) / temperature)`` for logits z. A token
    visits every expert with ``g > threshold``, so nearly all at first. After ``hard_after`` steps
    it visits the k experts with the largest g. Evaluation draws nothing and takes the k largest.
    With ``activation`` and without ``noise`` it is the gate of Nguyen et al. 2024 ("Is Temperature
    Sample Efficient for Softmax Gaussian Mixture of Experts?"), whose estimates converge faster:
    ``z = activation(W x) + b``.
    """

    paper: ClassVar[str] = "Nie et al. 2021 (EvoMoE); Nguyen et al. 2024"
    varies: ClassVar[bool] = True

    kind: Literal["dense_to_sparse"] = "dense_to_sparse"
    k: int = Field(default=1, ge=1)
    """Experts each token visits in evaluation, and in training after ``hard_after``."""
    noise: bool = True
    """Draw Gumbel noise in training."""
    activation: Literal["none", "gelu", "tanh", "sigmoid"] = "none"
    """A nonlinearity on the scores, which then get a learned bias."""
    weigh_by: Literal["gate", "softmax"] = "gate"
    """Weights of the chosen experts: ``g``, or ``softmax(z)`` without noise and temperature."""
    threshold: float = Field(default=0.001, ge=0, lt=1)
    """Experts with ``g`` above it are visited."""
    first_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the first step."""
    last_temperature: float = Field(default=0.5, gt=0)
    """Temperature after ``decay_steps`` and later."""
    decay: Literal["exponential", "linear"] = "exponential"
    """How the temperature falls."""
    decay_steps: int = Field(default=10_000, ge=1)
    """Steps until ``last_temperature``."""
    hard_after: int | None = Field(default=None, ge=0)
    """Steps after which a token visits k experts; None = never in training."""
    dense_evaluation: bool = False
    """Evaluation visits every expert above the threshold, as long as training does."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of ``E * sum_e P_e f_e``: P is the mean weight of expert e over all tokens and f
    the share of tokens that visit it."""
    seed: int = 0
    """Seed of the noise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.last_temperature > self.first_temperature:
            raise ValueError(
                f"last_temperature is {self.last_temperature}, but first_temperature is "
                f"{self.first_temperature}; lower last_temperature."
            )
        return self

    def build(self, sizes: RouterSizes) -> "DenseToSparseRouter":
        """Return the module."""
        return DenseToSparseRouter(self, sizes)

    def draws(self) -> bool:
        """Return ``noise``."""
        return self.noise

    def architecture(self) -> dict[str, Any]:
        """Return all but the noise and the loss."""
        values = super().architecture()
        for name in ("noise", "balance_loss", "seed"):
            del values[name]
        return values


class DenseToSparseRouter(Stepped, LinearRouter):
    """See :class:`DenseToSparse`."""

    def __init__(self, config: DenseToSparse, sizes: RouterSizes) -> None:
        super().__init__(config, sizes.d_model, sizes.num_experts)
        self.config: DenseToSparse = config
        has_bias = config.activation != "none"
        self.bias = nn.Parameter(torch.zeros(sizes.num_experts)) if has_bias else None
        self._stream = zlib.crc32(f"dense_to_sparse {config.seed} {sizes.layer}".encode())
        self.start_steps()

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return ``W x``, or ``activation(W x) + b``, ``[T, E]``."""
        logits_TE = super().logits(x_TD)
        if self.config.activation == "none":
            return logits_TE
        assert self.bias is not None
        return ACTIVATIONS[self.config.activation](logits_TE) + self.bias.to(logits_TE.dtype)

    def temperature(self, step: int) -> float:
        """Return the temperature after ``step`` steps."""
        config, done = self.config, min(1.0, step / self.config.decay_steps)
        first, last = config.first_temperature, config.last_temperature
        if config.decay == "linear":
            return first + (last - first) * done
        return first * (last / first) ** done

    def route(self, router_input: RouterInput) -> Routing:
        """Send each row to all experts above the threshold, or to k."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        config, step = self.config, int(self.step)
        logits_TE = self.logits(x_TD)
        noisy_TE = logits_TE
        if self.training and config.noise:
            noisy_TE = logits_TE + self._gumbel(router_input, step).to(logits_TE)
        gates_TE = (noisy_TE / self.temperature(step)).softmax(dim=1)
        weights_TE = gates_TE if config.weigh_by == "gate" else logits_TE.softmax(dim=1)
        is_hard = config.hard_after is not None and step >= config.hard_after
        if is_hard or not (self.training or config.dense_evaluation):
            best_TK = gates_TE.topk(self.k, dim=1).indices
            chosen_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(1, best_TK, True)
        else:
            chosen_TE = gates_TE > config.threshold
        weights_TE = torch.where(chosen_TE, weights_TE, 0)
        routing = routing_of_weights(weights_TE, valid_T)
        if self.training:
            valid_TE = weights_TE if valid_T is None else weights_TE[valid_T]
            routing.extras["weight_sums_E"] = valid_TE.sum(dim=0)
        return routing

    def _gumbel(self, router_input: RouterInput, step: int) -> Tensor:
        """Return Gumbel noise ``[T, E]``, on the CPU."""
        assert router_input.x_TD is not None

        def draw(num_rows: int, generator: Generator | None) -> Tensor:
            shape = (num_rows, self.num_experts)
            return torch.empty(shape, device="cpu").exponential_(generator=generator)

        times_TE = draw_rows(router_input, len(router_input.x_TD), step, self._stream, draw)
        return -times_TE.clamp(min=torch.finfo(times_TE.dtype).tiny).log()

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return the balance loss; see ``balance_loss``."""
        sums = BalanceSums(
            num_experts=self.num_experts,
            k=1,
            counts_E=counts.counts_E,
            probability_sums_E=kept(routing.extras, "weight_sums_E"),
            num_tokens=counts.num_tokens,
        )
        balance = sums.loss()
        return LayerLosses((self.config.balance_loss * balance,), balance=balance)
