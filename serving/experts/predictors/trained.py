"""A small network that was trained on a route file. L MoE layers, E experts, N rows, K choices.

H hidden width, S distances, D model width. For each target layer and distance, one hidden layer:

    h = relu(bias + sum of last[e] over the experts of the layer just passed
                  + sum of before[e] over those of the layer before it
                  + sum of recent[e] x how lately the sequence visited e in the target layer)
    chances = sigmoid(h @ out + out_bias)
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....moe.routes.rows import Array
from ..forwards import Forward
from . import predictor_file
from .chances import any_of, best_hints, visits, width_of
from .predictor import DISTANCE, Hint, PredictorFacts
from .recency import Recency

FORMAT = "moeyard-expert-predictor"
NAMES = ("last", "before", "recent", "bias", "out", "out_bias")


def shapes(facts: PredictorFacts, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's arrays; ``width`` is H."""
    num_layers, num_experts = len(facts.moe_layers), facts.num_experts
    return {
        "last": (DISTANCE, num_layers, num_experts, width),  # by layer of the expert
        "before": (DISTANCE, num_layers, num_experts, width),
        "recent": (num_layers, num_experts, width),  # by target layer, like the others
        "bias": (DISTANCE, num_layers, width),
        "out": (num_layers, width, num_experts),
        "out_bias": (DISTANCE, num_layers, num_experts),
    }


def save(path: Path, facts: PredictorFacts, arrays: dict[str, Array]) -> None:
    """Write a network, whole or not at all; raises ``OSError``."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    predictor_file.save(path, FORMAT, facts, tensors)


def read(path: Path, facts: PredictorFacts) -> dict[str, Array]:
    """Return the arrays of a file; raises :class:`ConfigError` unless it is for this model."""

    def expected(tensors: predictor_file.Tensors) -> predictor_file.Shapes:
        return shapes(facts, tensors["bias"].shape[-1] if "bias" in tensors else 0)

    how = (path, "trained", FORMAT, facts, expected, "moeyard trace predict --save")
    return {name: tensor.numpy() for name, tensor in predictor_file.read(*how).items()}


class Trained:
    """Runs a trained network."""

    def __init__(self, facts: PredictorFacts, arrays: dict[str, Array]) -> None:
        self._facts = facts
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._arrays = {name: arrays[name].astype(np.float32, copy=False) for name in NAMES}
        self._seen_LNK: list[Array] = []
        self._recency = Recency(facts)

    def begin(self, forward: Forward) -> list[Hint]:
        """Return hints for the first layer, by the tokens before: no layer comes before it."""
        self._seen_LNK = []
        self._recency.begin(forward)
        return self._first_hints(len(forward.sequences))

    def see(self, layer: int, experts_NK: Array) -> None:
        """Keep the choice."""
        self._recency.see(layer, experts_NK)
        self._seen_LNK.append(experts_NK)

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints for the next layers."""
        following, rows = self._facts.following(layer), len(self._seen_LNK[-1])
        if not following:
            return self._first_hints(rows)
        hints = []
        for distance, target in enumerate(following, start=1):
            chances_E = any_of(self._chances(self._place_of[target], distance))
            width = width_of(self._facts.k, rows, distance)
            hints += best_hints(target, chances_E, width)
        return hints

    def _chances(self, target: int, distance: int) -> Array:
        """Return ``[N, E]`` for MoE layer number ``target``."""
        arrays, number = self._arrays, distance - 1
        recent_NE = self._recency.by_row(self._facts.moe_layers[target])
        hidden_NH = recent_NE @ arrays["recent"][target] + arrays["bias"][number, target]
        for name, back in (("last", 0), ("before", 1)):
            place = target - distance - back
            if place >= 0:
                hidden_NH += _sums(arrays[name][number, place], self._seen_LNK[place])
        np.maximum(hidden_NH, 0, out=hidden_NH)
        logits_NE = hidden_NH @ arrays["out"][target] + arrays["out_bias"][number, target]
        return np.asarray(1 / (1 + np.exp(-logits_NE)))

    def _first_hints(self, rows: int) -> list[Hint]:
        first = self._facts.moe_layers[0]
        return best_hints(first, self._recency.chances(first), width_of(self._facts.k, rows, 1))


def _sums(table_EH: Array, experts_NK: Array) -> Array:
    """Return the sum of each row's experts' vectors, ``[N, H]``."""
    if len(experts_NK) == 1:
        experts_K = experts_NK[0]
        return np.asarray(table_EH[experts_K[experts_K >= 0]].sum(axis=0, keepdims=True))
    return np.asarray(visits(experts_NK, len(table_EH)) @ table_EH)
