"""The next layers' own routers, asked early. N rows, D model width, E experts, K choices, S layers.

The residual stream changes slowly, so what the experts of a layer read is close to what the routers
of the next layers will read. All routers of the next layers are one product: as they are, or fitted
to the rows of this layer (gate_maps.py).
"""

import numpy as np
from torch import Tensor

from ....kernels.foretell import Foreteller
from ....kernels.values.next_routers import NextRouters
from ....moe.models.model import Model
from ....moe.routers.linear import LinearRouter
from ....moe.routers.router import Router
from ....moe.routes.rows import Array
from ..forwards import Forward
from .chances import any_of, best_hints, width_of
from .gate_maps import GateMap, GateMaps, corrections_of, plain_maps
from .predictor import DISTANCE, Hint, PredictorFacts
from .recency import Recency

SHARPNESS = 13.0
"""How fast chances fall from the K-th score on: in the exponent, per range of a row's scores."""


def has_scores(router: Router) -> bool:
    """Say whether a router scores the experts by one product with what the experts read."""
    return isinstance(router, LinearRouter) and len(router.weight) >= router.num_experts


class NextGates:
    """Applies the routers of the next layers to the rows of this one."""

    def __init__(self, facts: PredictorFacts, decoder: Model, maps: GateMaps | None = None) -> None:
        """``maps`` are fitted routers; None = the model's own."""
        self._facts = facts
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._recency = Recency(facts)
        self._corrections_LE = corrections_of(decoder)
        widths = (width_of(facts.k, 1, distance) for distance in range(1, DISTANCE + 1))
        self._widths = [min(facts.num_experts, width) for width in widths]
        """Experts that are named for a row, by distance."""
        self._maps = plain_maps(facts, decoder) if maps is None else maps
        self._layers = [
            self._foreteller(gates, place, self._widths[0])
            for place, gates in enumerate(self._maps.layers, start=1 + facts.known)
        ]
        self._input: Foreteller | None = None
        if self._maps.input is not None:
            self._input = self._foreteller(self._maps.input, 0, self._widths[0])
        self.named: dict[int, Array | list[int]] = {}
        """By the number of the layer that had chosen: each row's best experts of the next layers,
        N times S times W, in the forward under way."""

    @property
    def reads_input(self) -> bool:
        """Say whether :meth:`at_input` has hints."""
        return self._input is not None

    def begin(self, forward: Forward) -> list[Hint]:
        """Return hints for the first layer, by the tokens before: no gate was asked for it."""
        self.named.clear()
        if self.reads_input:
            return []  # the rows will say more
        self._recency.begin(forward)
        return self._first_hints(len(forward.sequences))

    def at_input(self, x_ND: Tensor) -> list[Hint]:
        """Return hints for the first layers from the rows that enter the model."""
        if self._input is None:
            return []
        targets = self._facts.moe_layers[:DISTANCE]
        if len(x_ND) == 1:
            return self._hints_of_row(targets, *self._input.of_row(x_ND))
        return self._hints(targets, *self._input(x_ND))

    def see(self, layer: int, experts_NK: Array) -> None:
        """Count visits to the first layer."""
        if layer == self._facts.moe_layers[0] and not self.reads_input:
            self._recency.see(layer, experts_NK)

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints for the next layers."""
        assert x_ND is not None, "routes alone do not say what the gates would read"
        following = self._facts.following(layer)
        if not following:
            return self._first_hints(len(x_ND))
        place = self._place_of[layer]
        if len(x_ND) == 1:
            experts, chances = self._layers[place].of_row(x_ND)
            self.named[place] = experts
            return self._hints_of_row(following, experts, chances)
        experts_NSW, chances_NSW = self._layers[place](x_ND)
        self.named[place] = experts_NSW
        return self._hints(following, experts_NSW, chances_NSW)

    def best(self, layer: int, x_ND: Tensor, width: int) -> Array:
        """Return the ``width`` likeliest experts of the next layers, ``[N, S, width]``."""
        place = self._place_of[layer]
        first = place + 1 + self._facts.known
        foretell = self._foreteller(self._maps.layers[place], first, width)
        return foretell(x_ND)[0]

    def _foreteller(self, gates: GateMap, first: int, width: int) -> Foreteller:
        """Return what names ``width`` experts of layers from number ``first`` on."""
        corrections_SE = None
        if self._corrections_LE is not None:
            corrections_SE = self._corrections_LE[first : first + len(gates.bias_SE)]
        routers = NextRouters(*gates, corrections_SE, self._facts.k, width, SHARPNESS)
        return Foreteller(routers)

    def _hints_of_row(
        self, targets: tuple[int, ...], experts: list[int], chances: list[float]
    ) -> list[Hint]:
        """Return hints for S layers from S times W experts, the nearest layer first."""
        hints = list[Hint]()
        first = 0
        for target, width in zip(targets, self._widths, strict=False):
            for at in range(first, first + width):
                hints.append(Hint((target, experts[at]), chances[at]))
            first += self._widths[0]
        return hints

    def _hints(
        self, targets: tuple[int, ...], experts_NSW: Array, chances_NSW: Array
    ) -> list[Hint]:
        """Return hints for S layers, the nearest first."""
        rows, k = len(experts_NSW), self._facts.k
        hints = list[Hint]()
        for number, target in enumerate(targets):
            chances_NE = np.zeros((rows, self._facts.num_experts), dtype=np.float32)
            np.put_along_axis(chances_NE, experts_NSW[:, number], chances_NSW[:, number], axis=1)
            any_E = any_of(chances_NE)
            hints += best_hints(target, any_E, width_of(k, rows, number + 1))
        return hints

    def _first_hints(self, rows: int) -> list[Hint]:
        if self.reads_input:
            return []
        first = self._facts.moe_layers[0]
        return best_hints(first, self._recency.chances(first), width_of(self._facts.k, rows, 1))
