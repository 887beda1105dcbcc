"""A router's contribution to the loss of one layer, and the balance loss that routers share.

E experts, K choices, T tokens of the global batch.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import Tensor

from ...errors import ConfigError
from .routing import Routing


class GlobalCounts(NamedTuple):
    """The counts of one layer's router, summed over the global batch; int64, no gradient."""

    counts_E: Tensor
    """Routed rows of each expert."""
    num_tokens: Tensor
    """Valid rows."""
    extra: dict[str, Tensor]
    """The router's own ``Routing.extra_counts``."""

    @property
    def chosen_E(self) -> Tensor:
        """Rows that chose each expert, also those that a capacity dropped."""
        return self.extra.get("chosen_E", self.counts_E)

    def plus(self, other: "GlobalCounts") -> "GlobalCounts":
        """Return the sums over both batches."""
        extra = {name: value + other.extra[name] for name, value in self.extra.items()}
        return GlobalCounts(
            self.counts_E + other.counts_E, self.num_tokens + other.num_tokens, extra
        )

    def parts(self) -> list[Tensor]:
        """Return all counts, in the order of :meth:`like`."""
        return [self.counts_E, self.num_tokens, *self.extra.values()]

    def like(self, parts: Iterator[Tensor]) -> "GlobalCounts":
        """Return the same with other values, which are the next ones of ``parts``."""
        return GlobalCounts(next(parts), next(parts), {name: next(parts) for name in self.extra})


class BalanceSums(NamedTuple):
    """The sums that a balance loss is computed from; those of several layers can be pooled."""

    num_experts: int
    k: int
    counts_E: Tensor
    """Routed rows of the global batch."""
    probability_sums_E: Tensor
    """Probabilities summed over this rank's rows, with gradient."""
    num_tokens: Tensor
    """Tokens of the global batch."""

    def plus(self, other: "BalanceSums") -> "BalanceSums":
        """Return the sums over both layers, which must have the same experts and choices."""
        return self._replace(
            counts_E=self.counts_E + other.counts_E,
            probability_sums_E=self.probability_sums_E + other.probability_sums_E,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def loss(self) -> Tensor:
        """Return this rank's share of ``E / (K T^2) * sum_e n_e P_e``; 1 is perfect balance.

        n_e are the routed rows and P_e the summed probability of expert e over the global batch
        (Switch eq. 4-6, GShard; Megatron's normalisation).
        """
        divisor = self.num_tokens.clamp(min=1).double()  # a batch without tokens has no loss
        scale = self.num_experts / (self.k * divisor**2)
        share = (self.counts_E * scale * self.probability_sums_E).sum()
        return share.to(self.probability_sums_E.dtype)


class LayerLosses(NamedTuple):
    """What a router adds to the loss for one layer: this rank's share."""

    terms: tuple[Tensor, ...] = ()
    """Losses times their coefficients, with gradient."""
    pooled: tuple[float, BalanceSums] | None = None
    """Coefficient and sums of a balance loss over several layers together: those with the same
    coefficient, number of experts and k."""
    balance: Tensor | None = None
    """The layer's own balance loss without its coefficient, for logs."""
    z: Tensor | None = None
    """The z-loss without its coefficient, for logs."""


def balance_and_z(
    routing: Routing,
    counts: GlobalCounts,
    k: int,
    balance_loss: float,
    z_loss: float,
    balance_over: Literal["layer", "model"] = "layer",
    chosen_E: Tensor | None = None,
) -> LayerLosses:
    """Return the balance loss and the z-loss, times these coefficients.

    z is ``1/T * sum_t logsumexp(logits_t)^2`` (ST-MoE eq. 5). ``chosen_E`` are the rows to balance,
    for example first choices with k = 1; by default all choices, also those that were dropped.
    Raises :class:`ConfigError` for a routing of evaluation mode.
    """
    sums = BalanceSums(
        num_experts=len(counts.counts_E),
        k=k,
        counts_E=counts.chosen_E if chosen_E is None else chosen_E,
        probability_sums_E=training_sum(routing, "probability_sums_E"),
        num_tokens=counts.num_tokens,
    )
    balance = sums.loss()
    z = training_sum(routing, "z_sum") / counts.num_tokens.clamp(min=1)
    if balance_over == "layer":
        return LayerLosses((balance_loss * balance, z_loss * z), None, balance, z)
    return LayerLosses((z_loss * z,), (balance_loss, sums), balance, z)


def training_sum(routing: Routing, name: str) -> Tensor:
    """Return one of ``routing.extras``; :class:`ConfigError` for a routing of evaluation mode."""
    if name not in routing.extras:
        raise ConfigError(
            "the routing has no sums for losses, which routers keep in training mode only; call "
            "train() on the layer before its forward."
        )
    return routing.extras[name]
