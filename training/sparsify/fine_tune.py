"""Fine-tuning for sparse activations: the squared Hoyer measure of the gates is part of the loss.

T tokens, F width of the MLP.
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.values.activation import Activation
from ...moe.batch import batch_of_rows
from ...moe.models.decoder import Decoder
from .dense import gate_of, mlps
from .settings import Settings
from .steps import Phase, run_phase
from .text import Text

FLOOR = {"reglu": 0.0, "swiglu": -10.0}
"""Where a gate counts as silent. SiLU is nearly 0 from -10 down, D2DMoE's value for GELU."""


def active_share(gate_TF: Tensor, activation: Activation) -> Tensor:
    """Return the mean of ``|a|_1^2 / (F |a|_2^2)`` over tokens: 1 if neurons are equally active.

    ``a`` are the gate's values above :data:`FLOOR`. With one active neuron it is 1 / F. The papers'
    measure (Hoyer 2004, squared; Kurtz et al. 2020) has no F.
    """
    floor = FLOOR[activation]
    active_TF = gate_TF.clamp(min=floor) - floor
    share_T = active_TF.sum(dim=1).square() / (active_TF.square().sum(dim=1) + 1e-15)
    return share_T.mean() / gate_TF.shape[1]


def fine_tune(decoder: Decoder, text: Text, settings: Settings, phase: Phase) -> list[float]:
    """Train all weights on text with the sparsity loss; return the loss of each step.

    Its weight rises linearly to ``settings.sparsity`` over the first half of the steps (D2DMoE).
    """
    named = dict(decoder.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_()
    shares: list[Tensor] = []

    def loss_of(step: int) -> Tensor:
        shares.clear()
        loss = text_loss(decoder, text.windows("fine-tuning", step))
        weight = settings.sparsity * min(1.0, 2 * (step + 1) / settings.steps)
        return loss + weight * torch.stack(shares).mean()

    with ExitStack() as stack:
        for mlp in mlps(decoder).values():

            def see(_: nn.Module, __: Any, gate_TF: Tensor) -> None:
                shares.append(active_share(gate_TF, settings.activation))

            handle = gate_of(mlp).register_forward_hook(see)
            stack.callback(handle.remove)
        losses = run_phase(phase, named, loss_of)
    for parameter in named.values():
        parameter.requires_grad_(False)
    return losses


def text_loss(decoder: Decoder, windows_BL1: Tensor) -> Tensor:
    """Return the mean cross-entropy of the last L tokens of each window, in nats."""
    hidden_TD = decoder(batch_of_rows(windows_BL1[:, :-1])).hidden_TD
    return F.cross_entropy(decoder.logits(hidden_TD).float(), windows_BL1[:, 1:].flatten())
