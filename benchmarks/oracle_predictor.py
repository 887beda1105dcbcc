"""A predictor that knows the future, with a recall that is set: for benchmarks only."""

import random
from collections.abc import Iterable

from torch import Tensor

from moeyard.moe.routes.rows import Array, Routes
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.predictors.predictor import Hint, PredictorFacts


class Oracle:
    """Names the true next experts of a recorded greedy run; of each, a share is a wrong one.

    The run is the same prompts in the same order, once or several times. Forwards are told apart by
    what their first layer chose, so they must come in the recorded order. Hints are given one to
    three layers ahead; a wrong expert is one that the layer does not need.
    """

    def __init__(self, facts: PredictorFacts, routes: Routes, recall: float, seed: int = 0) -> None:
        self._facts, self._recall = facts, recall
        self._random = random.Random(seed)
        self._needed = [
            self._experts(routes, step) for step in range(int(routes.steps_N.max()) + 1)
        ]
        self._next = 0
        self._forward: list[set[int]] = []

    def begin(self, forward: Forward) -> list[Hint]:
        """Go on to the next recorded forward."""
        self._forward = self._needed[self._next % len(self._needed)]
        self._next += 1
        return self._hints([0])

    def see(self, layer: int, experts_NK: Array) -> None:
        """Check that the run is the recorded one."""
        own = {expert for expert in experts_NK.ravel().tolist() if expert >= 0}
        assert own == self._forward[self._facts.moe_layers.index(layer)], "another run"

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Name the experts of the next layers."""
        return self._hints(map(self._facts.moe_layers.index, self._facts.following(layer)))

    def _hints(self, places: Iterable[int]) -> list[Hint]:
        hints = []
        for place in places:
            needed = self._forward[place]
            others = [e for e in range(self._facts.num_experts) if e not in needed]
            for expert in sorted(needed):
                if others and self._random.random() >= self._recall:
                    expert = self._random.choice(others)
                hints.append(Hint((self._facts.moe_layers[place], expert), self._recall))
        return hints

    @staticmethod
    def _experts(routes: Routes, step: int) -> list[set[int]]:
        experts_NLK = routes.experts_NLK[routes.steps_N == step]
        layers = experts_NLK.swapaxes(0, 1)
        return [{e for e in layer.ravel().tolist() if e >= 0} for layer in layers]
