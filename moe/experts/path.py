"""The path of a layer's rows through its experts and back.

T tokens, D model width.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..routers.routing import Routing
from .base import LayerExperts

Beside = Callable[[], Tensor]
"""Work that does not depend on the routed experts: a layer's shared expert, ``[T, D]``."""


class ExpertPath(Protocol):
    """Brings rows and experts together: rows may travel to experts, or experts to rows.

    A layer does not know which path it has. Layers may share a path.
    """

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all experts, ``[E, ...]``, from those of this process, ``[S, ...]``.

        Backward returns the gradient of ``values`` summed over the processes that got them. All of
        them must call it, as they call ``run``.
        """
        ...

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """Return each token's weighted sum of its experts, plus the result of ``beside``.

        ``experts`` are those of this process. ``beside`` is called once; a path may call it
        while rows or experts are in transit. Its result is added to the finished sum, ``[T, D]``.
        """
        ...


class LocalPath:
    """All experts are in this process: nothing moves."""

    def gather(self, values: Tensor) -> Tensor:
        """Return ``values``."""
        return values

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`ExpertPath`."""
        y_TD: Tensor = experts(x_TD, routing.experts_TK, routing.weights_TK)
        return y_TD if beside is None else y_TD + beside()
