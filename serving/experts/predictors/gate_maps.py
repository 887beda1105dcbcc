"""From the rows of a layer to the scores of the next layers' routers. S layers, E experts, D width.

Each MoE layer but the last has one matrix, ``[S * E, D]``: what the experts of the layer read,
times the matrix, is what the routers of the next S layers will perhaps choose by. Fitted matrices
have one more, for what the model's first layer reads: the embeddings of the tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....moe.models.decoder_layer import DecoderLayer
from ....moe.models.model import Model
from ....moe.routers.linear import LinearRouter, project
from ....moe.routers.routing import Lookahead
from ....moe.routers.topk import TopKRouter
from .predictor import PredictorFacts

SMALLEST_NORM = 1e-3
"""Norm weights below this hide their dimension: dividing by them would blow up rounding."""


class GateMap(NamedTuple):
    """The next layers' routers for the rows of one layer."""

    weight_RD: Tensor
    """R = S * E, the nearest layer first; in the type of the rows."""
    bias_SE: Tensor
    """fp32."""

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return what the routers score, ``[N, S, E]``, fp32."""
        logits_NR = F.linear(x_ND.float(), self.weight_RD.float())
        return logits_NR.unflatten(1, self.bias_SE.shape) + self.bias_SE


class GateMaps(NamedTuple):
    """The maps of a model."""

    layers: list[GateMap]
    """Of each MoE layer but the last."""
    input: GateMap | None = None
    """From the rows that enter the model to its first S MoE layers."""


def corrections_of(decoder: Model) -> Tensor | None:
    """Return what is added to each layer's sigmoid scores, ``[L, E]``; None for softmax."""
    gates = [layer.gate for _, layer in decoder.moe_layers()]
    first = gates[0]
    if not isinstance(first, TopKRouter) or first.rule.score != "sigmoid":
        return None
    return torch.stack([_values(gate, "e_score_correction_bias") for gate in gates])


@torch.no_grad()
def plain_maps(facts: PredictorFacts, decoder: Model) -> GateMaps:
    """Return the routers of the next layers as they are, for residual streams that do not change.

    Rows are taken back to before this layer's norm weight, and on through the next ones' (Eliseev &
    Mazur 2023; HOBBIT).
    """
    dtype = next(decoder.parameters()).dtype
    norms, weights, biases = [], [], []
    for index, layer in decoder.moe_layers():
        block, gate = decoder.layers[index], layer.gate
        assert isinstance(block, DecoderLayer) and isinstance(gate, LinearRouter)
        norms.append(block.post_attention_layernorm.weight.float())
        weight_ED = gate.weight[: facts.num_experts].float()
        match gate.lookahead:
            case Lookahead.FFN_INPUT:
                weight_ED = weight_ED * norms[-1]
            case Lookahead.PREVIOUS_BLOCK:
                weight_ED = weight_ED * norms[-2:][0]
            case _:  # a residual without a norm
                pass
        weights.append(weight_ED)
        biases.append(_values(gate, "bias"))
    maps = []
    for place, index in enumerate(facts.foretelling):
        first = place + 1 + facts.known
        ahead = slice(first, first + len(facts.following(index)))
        norm_D = norms[place]
        inverse_D = torch.where(norm_D.abs() < SMALLEST_NORM, 0, 1 / norm_D)
        weight_RD = torch.cat([weight_ED * inverse_D for weight_ED in weights[ahead]])
        maps.append(GateMap(weight_RD.to(dtype), torch.stack(biases[ahead])))
    return GateMaps(maps)


def router_logits(gate: nn.Module, x_ND: Tensor) -> Tensor:
    """Return what a router scores rows with, ``[N, E]``, fp32."""
    assert isinstance(gate, LinearRouter)
    logits_NE = project(x_ND, gate.weight[: gate.num_experts])
    return logits_NE + _values(gate, "bias")


def _values(gate: nn.Module, name: str) -> Tensor:
    """Return a router's vector of experts in fp32, zeros if it has none."""
    assert isinstance(gate, LinearRouter)
    vector_E = getattr(gate, name) if isinstance(gate, TopKRouter) else None
    return torch.zeros(gate.num_experts) if vector_E is None else vector_E.detach().float()
