"""What a router around another one leaves to that one."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Self

from .router import RouterConfig
from .routing import Lookahead
from .row_facts import RowFact


class AroundRouter(RouterConfig):
    """Base of configurations with another router's in their field ``router``."""

    if TYPE_CHECKING:
        router: RouterConfig

    @property
    def needs_token_counts(self) -> bool:  # type: ignore[override]
        """Return what the inner router needs."""
        return self.router.needs_token_counts

    def problem_with(self, num_experts: int) -> str | None:
        """Return what the inner router says."""
        return self.router.problem_with(num_experts)

    def problem_with_activation(self, activation: str) -> str | None:
        """Return what the inner router says."""
        return self.router.problem_with_activation(activation)

    def reads_at(self) -> Lookahead:
        """Return what the inner router reads."""
        return self.router.reads_at()

    def reads_previous_ids(self) -> bool:
        """Return whether the inner router does."""
        return self.router.reads_previous_ids()

    def embeddings_folder(self) -> str | None:
        """Return that of the inner router."""
        return self.router.embeddings_folder()

    def draws(self) -> bool:
        """Return whether the inner router does."""
        return self.router.draws()

    def reads_of_rows(self) -> RowFact | None:
        """Return what the inner router reads."""
        return self.router.reads_of_rows()

    def why_not_among(self, has: Collection[RowFact]) -> str | None:
        """Return what the inner router says."""
        reason = self.router.why_not_among(has)
        return None if reason is None else f"router.{reason}"

    def why_not_causal(self) -> str | None:
        """Return what the inner router says."""
        return self.router.why_not_causal()

    def for_first_layer(self) -> Self:
        """Return this around the inner router of a first layer."""
        return self.model_copy(update={"router": self.router.for_first_layer()})
