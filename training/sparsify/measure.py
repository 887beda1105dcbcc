"""What each threshold costs in held-out loss and saves in operations.

The neurons of a layer are in the order of its experts (dense.py, ``reorder``).

T tokens, D model width, F width of the MLP, E experts, H width of the router.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe.batch import batch_of_rows
from ...moe.config.model import ModelConfig
from ...moe.models.decoder import Decoder
from ...moe.routers.contribution import Rule, chosen, predicted_norms
from ...parallel.simulation import flops
from ...progress import Progress
from .dense import watching
from .regress import Routers
from .settings import Settings
from .text import Text


@dataclass(frozen=True, slots=True)
class Row:
    """A threshold on held-out text."""

    tau: float
    loss: float
    """Nats per token."""
    experts: float
    """Experts that a token visits in a layer, on average."""
    layers: tuple[float, ...]
    """Those of each layer."""
    mlp_flops: float
    """Operations of experts and routers, over those of the dense MLPs."""
    flops: float
    """Operations of the whole model, over those of the dense model, in windows of this length."""


class Masked:
    """Leaves out the experts that a threshold leaves out, and counts those that run."""

    def __init__(self, routers: Routers, rule: Rule, tau: float) -> None:
        self._routers, self._rule, self._tau = routers, rule, tau
        self._runs: dict[int, int] = dict.fromkeys(routers, 0)
        self._tokens: dict[int, int] = dict.fromkeys(routers, 0)

    def see(self, layer: int, x_TD: Tensor, h_TF: Tensor) -> Tensor:
        """Return ``h_TF`` with zeros for the neurons of experts that do not run."""
        runs_TE = chosen(predicted_norms(x_TD, *self._routers[layer]), self._rule, self._tau)
        self._runs[layer] += int(runs_TE.sum())
        self._tokens[layer] += len(runs_TE)
        neurons = h_TF.shape[1] // runs_TE.shape[1]
        return torch.where(runs_TE.repeat_interleave(neurons, dim=1), h_TF, 0)

    def experts(self) -> tuple[float, ...]:
        """Return the experts that a token visited in each layer, on average."""
        return tuple(self._runs[layer] / self._tokens[layer] for layer in sorted(self._runs))


@torch.no_grad()
def held_out_loss(decoder: Decoder, text: Text) -> float:
    """Return the mean cross-entropy on held-out windows, in nats per token."""
    loss_sum, targets = 0.0, 0
    for windows_BL1 in text.held_out():
        hidden_TD = decoder(batch_of_rows(windows_BL1[:, :-1])).hidden_TD
        logits_TV, targets_T = decoder.logits(hidden_TD).float(), windows_BL1[:, 1:].flatten()
        loss_sum += float(F.cross_entropy(logits_TV, targets_T, reduction="sum"))
        targets += len(targets_T)
    return loss_sum / targets


def measure(decoder: Decoder, text: Text, settings: Settings, routers: Routers) -> list[Row]:
    """Return a row for each threshold of ``settings.grid``."""
    rows = []
    with Progress("measuring thresholds", len(settings.grid)) as progress:
        for tau in settings.grid:
            masked = Masked(routers, settings.rule, tau)
            with watching(decoder, masked.see):
                loss = held_out_loss(decoder, text)
            rows.append(_row(decoder.config, settings, tau, loss, masked.experts()))
            progress.advance()
    return rows


def _row(
    model: ModelConfig, settings: Settings, tau: float, loss: float, layers: tuple[float, ...]
) -> Row:
    assert model.d_ff is not None, "the folder was checked to be dense"
    width, num_layers, length = model.d_model, model.num_layers, settings.length
    dense_mlp = num_layers * flops.gated_mlp(model, model.d_ff, 1)
    router = 2 * settings.router_width * (width + settings.experts)
    expert = flops.gated_mlp(model, model.d_ff // settings.experts, 1)
    own = num_layers * router + sum(layers) * expert
    rest = flops.head(model, 1) + num_layers * flops.projections(model, 1)
    rest += sum(flops.attention(model, layer, 1, length) for layer in range(num_layers))
    return Row(
        tau=tau,
        loss=loss,
        experts=sum(layers) / num_layers,
        layers=layers,
        mlp_flops=own / dense_mlp,
        flops=(rest + own) / (rest + dense_mlp),
    )


def choose(rows: list[Row], settings: Settings) -> Row:
    """Return the row of ``settings.tau``, or the cheapest within ``settings.tolerance``.

    The first row, with all experts, is the one that losses are compared with.
    """
    if settings.tau is not None:
        return next(row for row in rows if row.tau == settings.tau)
    most = rows[0].loss * (1 + settings.tolerance)
    within = [row for row in rows if row.loss <= most or row is rows[0]]
    return min(within, key=lambda row: row.flops)


def lines_of(row: Row) -> int:
    """Return the width of lines of choices for a row: about the experts of a token."""
    return max(1, math.ceil(row.experts))
