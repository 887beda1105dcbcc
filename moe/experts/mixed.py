"""Experts of several widths, for inference. N rows, D model width, K choices."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ...kernels.values.quantized_weights import QuantizedExpertWeights
from ...kernels.waves import start_waves
from .base import LayerExperts


class MixedExperts(LayerExperts):
    """Replaces :class:`Experts`; all experts are in memory, each in one of several widths.

    A routed row's line depends on its expert only, so the sum has the bits that it has behind a
    store, and an expert the bits that it has where all experts have its width.
    """

    def __init__(self, weights: Sequence[QuantizedExpertWeights], kind_of_E: Sequence[int]) -> None:
        """``weights`` are those of each width, and ``kind_of_E`` is each expert's index into them.

        The slot tables of the weights may have more experts than that: :meth:`choose` decides.
        """
        super().__init__()
        self.weights = list(weights)
        self.choose(kind_of_E)

    def choose(self, kind_of_E: Sequence[int]) -> None:
        """Say which width each expert has from now on."""
        self.kind_of_E = tuple(kind_of_E)
        self._experts_of = [
            [expert for expert, kind in enumerate(self.kind_of_E) if kind == index]
            for index in range(len(self.weights))
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixedExperts":
        """Follow the module to a device; values and scales keep their types."""
        self.weights = [w.to(fn(w.fc1.values[:0]).device) for w in self.weights]
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Say how many experts there are of which width, for ``repr``."""
        first = self.weights[0]
        counts = (
            f"{len(experts)} int{weights.fc1.bits}"
            for weights, experts in zip(self.weights, self._experts_of, strict=True)
        )
        return f"{', '.join(counts)} experts, d_model={first.d_model}, d_expert={first.fc2.width}"

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        waves = start_waves(x_ND, experts_NK, weights_NK, len(self.kind_of_E))
        for weights, experts in zip(self.weights, self._experts_of, strict=True):
            if experts:
                waves.add(weights, only=experts)
        return waves.result()
