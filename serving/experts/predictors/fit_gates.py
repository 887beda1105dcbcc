"""Fit the routers of the next layers to the rows of each layer, and say how good they are.

N rows, D model width, S layers, E experts, R = S * E, K choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....moe.batch import batch_of
from ....moe.models.model import Model
from ....moe.routers.router import Router
from ....moe.routers.routing import Lookahead
from .gate_maps import GateMap, GateMaps, plain_maps, router_logits
from .next_gates import NextGates
from .predictor import DISTANCE, PredictorFacts
from .recall import Recall, widths_of

RIDGE = 1e-4
"""How strongly a fit is drawn to the routers themselves, as a share of the mean square of a row's
entries. On a model of 8 layers and width 512, fitted to 20,000 bytes, 1e-3 foretells 0.847 of the
next layer's experts of another text, 1e-4 0.854, 1e-5 0.856; with 2,000 bytes 1e-4 is best."""
LONGEST = 512
"""Tokens of a piece of text."""
BYTES_AT_ONCE = 1 << 30
"""Of sums for layers that are fitted in one pass over the text."""


class _Read(NamedTuple):
    """What a model read of a text."""

    inputs_LND: list[Tensor]
    """What enters the model, and each MoE layer."""
    rows_LND: list[Tensor]
    """What the experts of each MoE layer read."""
    experts_LNK: list[Tensor]

    def gate_rows(self, place: int, lookahead: Lookahead) -> Tensor:
        """Return what the router of a MoE layer read."""
        if lookahead is Lookahead.ATTENTION_INPUT:
            return self.inputs_LND[1 + place]
        if lookahead is Lookahead.PREVIOUS_BLOCK:
            return self.rows_LND[max(0, place - 1)]
        return self.rows_LND[place]


@dataclass(slots=True)
class _Sums:
    """What a fit of one layer needs of all rows: products of rows, and with what routers add."""

    rows_DD: Tensor
    errors_DR: Tensor


def pieces(ids: Sequence[int], longest: int) -> list[Tensor]:
    """Cut a text into pieces that a model reads on their own."""
    length = min(LONGEST, longest)
    whole = torch.tensor(ids, dtype=torch.int64)
    return [whole[start : start + length] for start in range(0, len(ids), length)]


@torch.no_grad()
def fit_gates(
    facts: PredictorFacts,
    decoder: Model,
    texts: Sequence[Tensor],
    report: Callable[[], None] | None = None,
) -> GateMaps:
    """Return fitted routers for the input and each MoE layer that foretells, by ridge regression.

    Least squares between what the next layers' routers score and a linear function of the rows.
    ``report`` is called after each of :func:`num_steps` pieces.
    """
    layers = plain_maps(facts, decoder).layers
    starts = [_nothing(facts, layers[0]), *layers]
    gates = [layer.gate for _, layer in decoder.moe_layers()]
    fitted: list[GateMap] = []
    for places in _groups(decoder.config.d_model, len(starts)):
        sums = {place: _sums(starts[place]) for place in places}
        for ids_T in texts:
            read = _read(decoder, ids_T)
            for place in places:
                _add(sums[place], facts, place, starts[place], read, gates)
            if report is not None:
                report()
        fitted += [_solve(sums[place], starts[place]) for place in places]
    return GateMaps(fitted[1:], fitted[0])


def num_steps(facts: PredictorFacts, decoder: Model, num_texts: int) -> int:
    """Return how often a fit reports."""
    return num_texts * len(_groups(decoder.config.d_model, 1 + len(facts.foretelling)))


@torch.no_grad()
def judge_gates(
    facts: PredictorFacts, decoder: Model, texts: Sequence[Tensor], gates: NextGates
) -> list[Recall]:
    """Return how much of the choices in texts the gates foretell, token by token."""
    counts: dict[tuple[int, int], list[int]] = {}
    for ids_T in texts:
        read = _read(decoder, ids_T)
        for place, layer in enumerate(facts.foretelling):
            best_NSE = gates.best(layer, read.rows_LND[place], facts.num_experts)
            for number in range(best_NSE.shape[1]):
                distance = facts.known + 1 + number
                true_NK = read.experts_LNK[place + distance].numpy()
                for width in widths_of(facts.k, facts.num_experts, number + 1):
                    named_NW = best_NSE[:, number, :width]
                    is_right_NW = (named_NW[:, :, None] == true_NK[:, None]).any(axis=2)
                    found = counts.setdefault((distance, width), [0, 0, 0])
                    found[0] += true_NK.size
                    found[1] += named_NW.size
                    found[2] += int(is_right_NW.sum())
    return [Recall(*key, *found) for key, found in sorted(counts.items())]


def _groups(d_model: int, num_layers: int) -> list[range]:
    """Return places of layers that are fitted together."""
    at_once = max(1, BYTES_AT_ONCE // (8 * (d_model + 1) ** 2))
    return [range(at, min(at + at_once, num_layers)) for at in range(0, num_layers, at_once)]


def _read(decoder: Model, ids_T: Tensor) -> _Read:
    """Let a model read a text."""
    read = _Read([], [], [])

    def note_input(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        read.inputs_LND.append(arguments[0])

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        read.rows_LND.append(arguments[0])
        read.experts_LNK.append(arguments[1])

    indices = [0, *(index for index, _ in decoder.moe_layers())]
    handles = [decoder.layers[i].register_forward_pre_hook(note_input) for i in indices]
    handles += [layer.experts.register_forward_pre_hook(note) for _, layer in decoder.moe_layers()]
    try:
        decoder(batch_of([ids_T]))
    finally:
        for handle in handles:
            handle.remove()
    return read


def _nothing(facts: PredictorFacts, other: GateMap) -> GateMap:
    """Return a map that says nothing, for the input."""
    shape = len(facts.moe_layers[:DISTANCE]), facts.num_experts
    weight_RD = other.weight_RD.new_zeros(shape[0] * shape[1], other.weight_RD.shape[1])
    return GateMap(weight_RD, torch.zeros(shape))


def _sums(start: GateMap) -> _Sums:
    num_outputs, d_model = start.weight_RD.shape
    return _Sums(torch.zeros(d_model + 1, d_model + 1), torch.zeros(d_model + 1, num_outputs))


def _add(
    sums: _Sums,
    facts: PredictorFacts,
    place: int,
    start: GateMap,
    read: _Read,
    gates: Sequence[Router],
) -> None:
    """Add the rows of a text: what the next routers score, less what ``start`` says.

    Place 0 is the input, and place n the n-th MoE layer.
    """
    x_ND = (read.inputs_LND[0], *read.rows_LND)[place]
    first = place + facts.known if place else 0
    true_NSE = torch.stack(
        [
            router_logits(gates[n], read.gate_rows(n, gates[n].lookahead))
            for n in range(first, first + len(start.bias_SE))
        ],
        dim=1,
    )
    error_NR = (true_NSE - start.logits(x_ND)).flatten(1)
    rows_ND = F.pad(x_ND.float(), (0, 1), value=1.0)
    sums.rows_DD += rows_ND.T @ rows_ND
    sums.errors_DR += rows_ND.T @ error_NR


def _solve(sums: _Sums, start: GateMap) -> GateMap:
    rows_DD = sums.rows_DD.double()
    rows_DD.diagonal().add_(RIDGE * rows_DD.diagonal().mean())
    more_DR = torch.linalg.solve(rows_DD, sums.errors_DR.double())
    weight_RD = start.weight_RD.double() + more_DR[:-1].T
    bias_SE = start.bias_SE + more_DR[-1].reshape(start.bias_SE.shape).float()
    return GateMap(weight_RD.to(start.weight_RD.dtype), bias_SE)
