"""Robust MomentumSMoE (Teo and Nguyen 2024), with the Robust Momentum Method of Cyrus et al. 2018.

T tokens, D model width.
"""

from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor

from .block import BlockConfig, Place, State
from .momentum import Momentum


class Rates(NamedTuple):
    """The three numbers that the method uses."""

    mu: float
    gamma: float
    alpha: float


class Robust(BlockConfig):
    """``y = experts(x + alpha m)``, ``m = mu m + gamma y`` and ``x + m`` (Robust MomentumSMoE).

    Experts and routers read ahead, where the momentum would lead. mu, gamma and alpha follow from a
    condition number k, a rate rho and a Lipschitz constant L (Cyrus et al. 2018)::

        gamma = k (1 - rho)^2 (1 + rho) / L
        mu    = k rho^3 / (k - 1)
        alpha = rho^3 / ((k - 1) (1 - rho)^2 (1 + rho))

    or are given one by one. mu is below 1 for every rho that is allowed. Signs are those of
    ``momentum``.
    """

    paper: ClassVar[str] = "Teo and Nguyen 2024 (MomentumSMoE); Cyrus et al. 2018"

    kind: Literal["robust"] = "robust"
    condition: float = Field(default=10.0, gt=1)
    """k: how uneven the objective is that the layers are thought to descend."""
    rho: float = Field(default=0.7, gt=0, lt=1)
    """Rate of convergence, from 1 - 1 / sqrt(k), which is fast, to 1 - 1 / k, which withstands more
    noise."""
    lipschitz: float = Field(default=1.0, gt=0)
    """L, which only scales gamma."""
    mu: float | None = Field(default=None, ge=0, lt=1)
    """Part of the momentum that the next MoE layer keeps; None = from k and rho."""
    gamma: float | None = Field(default=None, gt=0)
    """Factor on the experts' output; None = from k, rho and L."""
    alpha: float | None = Field(default=None, ge=0)
    """Part of the momentum that experts read ahead; None = from k and rho. 0 is ``momentum``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = 1 - self.condition**-0.5, 1 - 1 / self.condition
        if not low <= self.rho <= high:
            raise ValueError(
                f"rho is {self.rho}, but with condition = {self.condition} the method converges "
                f"for {low:.4g} to {high:.4g} only; use a value between."
            )
        return self

    def rates(self) -> Rates:
        """Return mu, gamma and alpha."""
        k, rho = self.condition, self.rho
        slack = (1 - rho) ** 2 * (1 + rho)
        mu = k * rho**3 / (k - 1) if self.mu is None else self.mu
        gamma = k * slack / self.lipschitz if self.gamma is None else self.gamma
        alpha = rho**3 / ((k - 1) * slack) if self.alpha is None else self.alpha
        return Rates(mu, gamma, alpha)

    def experts_read(self, x_TD: Tensor, state: State) -> Tensor:
        """Return ``x + alpha m``; without alpha x itself, whose norm is known already."""
        alpha = self.rates().alpha
        if not state or alpha == 0:
            return x_TD
        return (x_TD + alpha * state[0]).to(x_TD.dtype)

    def join(self, x_TD: Tensor, y_TD: Tensor, state: State, place: Place) -> tuple[Tensor, State]:
        """Add the momentum, which is the state."""
        return self._momentum().join(x_TD, y_TD, state, place)

    def num_carried(self, place: Place) -> int:
        """Return 1 behind the first MoE layer."""
        return self._momentum().num_carried(place)

    def architecture(self) -> dict[str, Any]:
        """Return mu, gamma and alpha, however they were given."""
        rates = self.rates()
        if rates.alpha == 0:
            return self._momentum().architecture()
        return {"kind": self.kind, **rates._asdict()}

    def _momentum(self) -> Momentum:
        rates = self.rates()
        return Momentum(mu=rates.mu, gamma=rates.gamma)
