"""The next layers' own routers, asked early. N rows, D model width, E experts, K choices, S layers.

The residual stream changes slowly, so what the experts of a layer read is close to what the routers
of the next layers will read (Eliseev & Mazur 2023; HOBBIT). Rows are taken back to before this
layer's norm weight, and each gate has the weight of the norm in front of it folded in. All gates of
the next layers are one product.
"""

import numpy as np
import torch
from torch import Tensor

from ....moe.models.decoder_layer import DecoderLayer
from ....moe.models.model import Model
from ....moe.routers.linear import LinearRouter
from ....moe.routers.router import Router
from ....moe.routers.topk import TopKRouter
from ....moe.routes.rows import Array
from ..forwards import Forward
from .chances import any_of, best_hints, width_of
from .predictor import DISTANCE, Hint, PredictorFacts
from .recency import Recency

SMALLEST_NORM = 1e-3
"""Norm weights below this hide their dimension: dividing by them would blow up rounding."""
SHARPNESS = 13.0
"""How fast chances fall from the K-th score on: in the exponent, per range of a row's scores."""


def has_scores(router: Router) -> bool:
    """Say whether a router scores the experts by one product with what the experts read."""
    return isinstance(router, LinearRouter) and len(router.weight) >= router.num_experts


class NextGates:
    """Applies the gates of the next layers to the rows of this one."""

    @torch.no_grad()
    def __init__(self, facts: PredictorFacts, decoder: Model) -> None:
        self._facts = facts
        self._place_of = {layer: place for place, layer in enumerate(facts.moe_layers)}
        self._recency = Recency(facts)
        self.named: dict[int, Array] = {}
        """By the number of the layer that had chosen: each row's best experts of the next layers,
        ``[N, S, W]``, in the forward under way."""
        gates, biases, corrections, inverse = [], [], [], []
        for index, layer in decoder.moe_layers():
            block = decoder.layers[index]
            assert isinstance(block, DecoderLayer) and isinstance(layer.gate, LinearRouter)
            norm_D = block.post_attention_layernorm.weight.float().numpy()
            gates.append(layer.gate.weight[: facts.num_experts].float().numpy() * norm_D)
            is_small_D = np.abs(norm_D) < SMALLEST_NORM
            inverse.append(np.where(is_small_D, 0, 1 / np.where(is_small_D, 1, norm_D)))
            bias_E, correction_E = _biases(layer.gate)
            biases.append(bias_E)
            corrections.append(correction_E)
        self._gates_LED = np.stack(gates)
        self._inverse_LD = np.stack(inverse).astype(np.float32)
        self._biases_LE = np.stack(biases)
        self._corrections_LE = np.stack(corrections)
        first = decoder.moe_layers()[0][1].gate
        self._is_sigmoid = isinstance(first, TopKRouter) and first.rule.score == "sigmoid"

    def begin(self, forward: Forward) -> list[Hint]:
        """Return hints for the first layer, by the tokens before: no gate was asked for it."""
        self.named.clear()
        self._recency.begin(forward)
        return self._first_hints(len(forward.sequences))

    def see(self, layer: int, experts_NK: Array) -> None:
        """Count visits to the first layer."""
        if layer == self._facts.moe_layers[0]:
            self._recency.see(layer, experts_NK)

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints for the next layers."""
        assert x_ND is not None, "routes alone do not say what the gates would read"
        following = self._facts.following(layer)
        if not following:
            return self._first_hints(len(x_ND))
        rows = len(x_ND)
        best_NSW, chances_NSW = self._best(self.scores(layer, x_ND))
        self.named[self._place_of[layer]] = best_NSW
        hints = []
        for number, target in enumerate(following):
            width = width_of(self._facts.k, rows, number + 1)
            if rows == 1:
                experts = best_NSW[0, number, :width].tolist()
                chances = chances_NSW[0, number, :width].tolist()
                hints += [Hint((target, e), c) for e, c in zip(experts, chances, strict=True)]
                continue
            chances_NE = np.zeros((rows, self._facts.num_experts), dtype=np.float32)
            np.put_along_axis(chances_NE, best_NSW[:, number], chances_NSW[:, number], axis=1)
            hints += best_hints(target, any_of(chances_NE), width)
        return hints

    def scores(self, layer: int, x_ND: Tensor) -> Array:
        """Return what the next layers' routers would choose by, ``[N, S, E]``."""
        place = self._place_of[layer]
        ahead = slice(place + 1, place + 1 + DISTANCE)
        gates_SED = self._gates_LED[ahead]
        plain_ND = x_ND.float().numpy() * self._inverse_LD[place]
        logits_NR = plain_ND @ gates_SED.reshape(-1, gates_SED.shape[-1]).T
        scores_NSE = logits_NR.reshape(len(x_ND), len(gates_SED), -1) + self._biases_LE[ahead]
        if self._is_sigmoid:
            scores_NSE = 1 / (1 + np.exp(-scores_NSE)) + self._corrections_LE[ahead]
        return np.asarray(scores_NSE)

    def _best(self, scores_NSE: Array) -> tuple[Array, Array]:
        """Return each row's best experts, ``[N, S, W]``, the best first, and their chances.

        Chances fall from the K-th best score on; the store calibrates them.
        """
        k = self._facts.k
        order_NSE = np.argsort(-scores_NSE, axis=2)
        values_NSE = np.take_along_axis(scores_NSE, order_NSE, axis=2)
        width = width_of(k, 1, 1)
        spread_NS1 = values_NSE[:, :, :1] - values_NSE[:, :, -1:] + 1e-6
        margin_NSW = (values_NSE[:, :, :width] - values_NSE[:, :, k - 1 : k]) / spread_NS1
        return order_NSE[:, :, :width], 1 / (1 + np.exp(-SHARPNESS * margin_NSW))

    def _first_hints(self, rows: int) -> list[Hint]:
        first = self._facts.moe_layers[0]
        return best_hints(first, self._recency.chances(first), width_of(self._facts.k, rows, 1))


def _biases(router: LinearRouter) -> tuple[Array, Array]:
    """Return what is added to a router's logits, and to its scores before it chooses."""
    nothing_E = np.zeros(router.num_experts, dtype=np.float32)
    if not isinstance(router, TopKRouter):
        return nothing_E, nothing_E
    bias_E, correction_E = router.bias, router.e_score_correction_bias
    return (
        nothing_E if bias_E is None else bias_E.float().numpy(),
        nothing_E if correction_E is None else correction_E.float().numpy(),
    )
