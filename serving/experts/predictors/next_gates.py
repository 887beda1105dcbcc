"""The next layers' own routers, asked early. N rows, D model width, E experts, K choices, S layers.

The residual stream changes slowly, so what the experts of a layer read is close to what the routers
of the next layers will read. All routers of the next layers are one product: as they are, or fitted
to the rows of this layer (gate_maps.py).
"""

import numpy as np
import torch
from torch import Tensor

from ....kernels.foretell import Foreteller
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
        self._width = min(facts.num_experts, width_of(facts.k, 1, 1))
        self._maps = plain_maps(facts, decoder) if maps is None else maps
        self._layers = [
            self._foreteller(gates, place, self._width)
            for place, gates in enumerate(self._maps.layers, start=1)
        ]
        self._input: Foreteller | None = None
        if self._maps.input is not None:
            self._input = self._foreteller(self._maps.input, 0, self._width)
        self.named: dict[int, Tensor] = {}
        """By the number of the layer that had chosen: each row's best experts of the next layers,
        ``[N, S, W]``, in the forward under way."""

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
        return self._hints(self._facts.moe_layers[:DISTANCE], *self._input(x_ND))

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
        experts_NSW, chances_NSW = self._layers[place](x_ND)
        self.named[place] = experts_NSW
        return self._hints(following, experts_NSW, chances_NSW)

    def best(self, layer: int, x_ND: Tensor, width: int) -> Array:
        """Return the ``width`` likeliest experts of the next layers, ``[N, S, width]``."""
        place = self._place_of[layer]
        foretell = self._foreteller(self._maps.layers[place], place + 1, width)
        return np.asarray(foretell(x_ND)[0].numpy())

    def _foreteller(self, gates: GateMap, first: int, width: int) -> Foreteller:
        """Return what names ``width`` experts of layers from number ``first`` on."""
        corrections_SE = None
        if self._corrections_LE is not None:
            corrections_SE = self._corrections_LE[first : first + len(gates.bias_SE)]
        return Foreteller(*gates, corrections_SE, self._facts.k, width, SHARPNESS)

    def _hints(
        self, targets: tuple[int, ...], experts_NSW: Tensor, chances_NSW: Tensor
    ) -> list[Hint]:
        """Return hints for S layers, the nearest first."""
        rows, k = len(experts_NSW), self._facts.k
        if rows == 1:
            lines = zip(targets, experts_NSW[0].tolist(), chances_NSW[0].tolist(), strict=True)
            return [
                Hint((target, expert), chance)
                for distance, (target, experts, chances) in enumerate(lines, start=1)
                for expert, chance in zip(
                    experts[: width_of(k, 1, distance)], chances, strict=False
                )
            ]
        hints = list[Hint]()
        for number, target in enumerate(targets):
            chances_NE = torch.zeros(rows, self._facts.num_experts)
            chances_NE.scatter_(1, experts_NSW[:, number].long(), chances_NSW[:, number])
            any_E = any_of(chances_NE.numpy())
            hints += best_hints(target, any_E, width_of(k, rows, number + 1))
        return hints

    def _first_hints(self, rows: int) -> list[Hint]:
        if self.reads_input:
            return []
        first = self._facts.moe_layers[0]
        return best_hints(first, self._recency.chances(first), width_of(self._facts.k, rows, 1))
