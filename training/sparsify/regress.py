"""Train the routers: each predicts the norms of its experts' outputs, everything else is frozen.

The neurons of a layer are in the order of its experts (dense.py, ``reorder``).

T tokens, D model width, F width of the MLP, E experts, f = F / E, H width of the router.
"""

import torch
from torch import Tensor

from ...moe.batch import batch_of_rows
from ...moe.models.decoder import Decoder
from ...moe.routers.contribution import first_matrices, predicted_norms
from .dense import mlps, watching
from .settings import Settings
from .steps import Phase, run_phase
from .text import Text

PER_FORWARD = 4
"""Steps that share a forward, each on its part of the rows: the model costs far more than the
routers."""

Routers = dict[int, tuple[Tensor, Tensor]]
"""The matrices ``hidden_HD`` and ``norm_EH`` of each layer."""


class OutputNorms:
    """The norm of what each expert of a layer adds, from what goes into its down projection.

    ``|W_e h_e|^2`` is ``h_e (W_e^T W_e) h_e``: it takes f products for a neuron, not D.
    """

    def __init__(self, down_DF: Tensor, num_experts: int) -> None:
        down_EDf = down_DF.unflatten(1, (num_experts, -1)).movedim(1, 0)
        self._gram_Eff = down_EDf.mT @ down_EDf

    def of(self, h_TF: Tensor) -> Tensor:
        """Return the norms, ``[T, E]``."""
        h_ETf = h_TF.unflatten(1, (len(self._gram_Eff), -1)).movedim(1, 0)
        squares_ET = (h_ETf @ self._gram_Eff * h_ETf).sum(dim=2)
        return squares_ET.clamp(min=0).sqrt().T


def train_routers(
    decoder: Decoder, text: Text, settings: Settings, phase: Phase
) -> tuple[Routers, list[float]]:
    """Return the routers, and the loss of each step: the squared error over the mean square.

    Targets are divided by each layer's mean norm at first, so that one learning rate fits all
    layers; at the end the routers are multiplied by it.
    """
    layers = mlps(decoder)
    norms = {n: OutputNorms(mlp.down_proj.weight, settings.experts) for n, mlp in layers.items()}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    looked = -1

    def see(layer: int, x_TD: Tensor, h_TF: Tensor) -> None:
        seen[layer] = (x_TD, norms[layer].of(h_TF))

    def look(forward: int) -> None:
        nonlocal looked
        if forward != looked:
            with torch.no_grad(), watching(decoder, see):
                decoder(batch_of_rows(text.windows("routers", forward)[:, :-1]))
        looked = forward

    look(0)
    scales = {layer: max(1e-12, float(norms_TE.mean())) for layer, (_, norms_TE) in seen.items()}
    sizes = (settings.router_width, decoder.config.d_model, settings.experts)
    routers = {
        layer: tuple(m.requires_grad_() for m in first_matrices(*sizes, settings.seed + layer))
        for layer in layers
    }

    def loss_of(step: int) -> Tensor:
        forward, part = divmod(step, PER_FORWARD)
        look(forward)
        errors = []
        for layer, (all_TD, norms_TE) in seen.items():
            x_TD, target_TE = all_TD[part::PER_FORWARD], norms_TE[part::PER_FORWARD] / scales[layer]
            error = (predicted_norms(x_TD, *routers[layer]) - target_TE).square().mean()
            errors.append(error / target_TE.square().mean())
        return torch.stack(errors).mean()

    named = {
        f"{layer}/{name}": matrix
        for layer, matrices in routers.items()
        for name, matrix in zip(("hidden_HD", "norm_EH"), matrices, strict=True)
    }
    losses = run_phase(phase, named, loss_of)
    with torch.no_grad():
        found = {n: (hidden.detach(), norm * scales[n]) for n, (hidden, norm) in routers.items()}
    return found, losses
