"""Train the network of trained.py on recorded routes.

R recorded rows, L MoE layers, E experts, K choices, H hidden width.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....moe.routes.rows import Array, Routes
from .predictor import DISTANCE, PredictorFacts
from .recency import DECAY
from .trained import shapes

WIDTH = 128
STEPS, ROWS, LEARNING_RATE = 1500, 256, 3e-3
"""16 to 49 s for 8 layers of 32 experts, on a core shared with other work. Chosen by hand: other
values were not compared."""
FORGOTTEN = 0.15
"""Share of training rows without recent visits: a prompt's rows have none."""


def fit(
    facts: PredictorFacts,
    routes: Routes,
    seed: int = 0,
    report: Callable[[], None] | None = None,
) -> dict[str, Array]:
    """Return a network's arrays; the same arguments give the same ones on one machine.

    ``report`` is called after every step.
    """
    order_R = np.lexsort((routes.positions_N, routes.sequences_N))
    experts_RLK = routes.experts_NLK[order_R]
    recent = _Recent(experts_RLK, routes.sequences_N[order_R], facts.num_experts)
    generator = torch.Generator().manual_seed(seed)
    parameters = _start(facts, generator)
    optimizer = torch.optim.Adam(parameters.values(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(experts_RLK), (ROWS,), generator=generator).numpy()
        kept_R = torch.rand(ROWS, 1, 1, generator=generator) >= FORGOTTEN
        recent_RLE = torch.from_numpy(recent.of(chosen)) * kept_R
        loss = _loss(parameters, torch.from_numpy(experts_RLK[chosen]), recent_RLE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if report is not None:
            report()
    return {name: value.detach().numpy() for name, value in parameters.items()}


class _Recent:
    """How lately each row's sequence visited each expert before the row; see recency.py."""

    STEPS = 8
    """Tokens back; the ones before weigh 6 %."""

    def __init__(self, experts_RLK: Array, sequences_R: Array, num_experts: int) -> None:
        self._experts_RLK, self._sequences_R = experts_RLK, sequences_R
        self._num_experts = num_experts

    def of(self, rows: Array) -> Array:
        """Return ``[R, L, E]`` for some rows."""
        experts_RLK = self._experts_RLK
        shape = (len(rows), experts_RLK.shape[1], self._num_experts + 1)
        found_RLE = np.zeros(shape, dtype=np.float32)
        at = np.arange(len(rows))[:, None, None], np.arange(shape[1])[None, :, None]
        for back in range(1, self.STEPS + 1):
            before = np.maximum(rows - back, 0)
            is_same = (rows >= back) & (self._sequences_R[before] == self._sequences_R[rows])
            weight_R = is_same * (1 - DECAY) * DECAY ** (back - 1)
            found_RLE[(*at, experts_RLK[before])] += weight_R[:, None, None]
        return found_RLE[:, :, :-1]  # the last column is -1, none


def _start(facts: PredictorFacts, generator: torch.Generator) -> dict[str, Tensor]:
    parameters = {}
    for name, shape in shapes(facts, WIDTH).items():
        if name.endswith("bias"):
            value = torch.zeros(shape)
        else:
            scale = WIDTH**-0.5 if name == "out" else facts.k**-0.5
            value = torch.randn(shape, generator=generator) * scale * 0.5
        parameters[name] = value.requires_grad_()
    return parameters


def _loss(parameters: dict[str, Tensor], experts_RLK: Tensor, recent_RLE: Tensor) -> Tensor:
    """Return the mean cross entropy of all target layers and distances."""
    num_experts = recent_RLE.shape[2]
    padded_RLE = F.one_hot(experts_RLK.long() + 1, num_experts + 1).amax(dim=2).float()
    visits_RLE = padded_RLE[:, :, 1:]
    recent_RLH = torch.einsum("rle,leh->rlh", recent_RLE, parameters["recent"])
    terms = []
    for number in range(min(DISTANCE, visits_RLE.shape[1] - 1)):
        ahead = number + 1
        sources_RLE = visits_RLE[:, :-ahead]
        last = parameters["last"][number, :-ahead]
        hidden_RLH = torch.einsum("rle,leh->rlh", sources_RLE, last)
        before = parameters["before"][number, : -ahead - 1]
        if before.shape[0]:
            earlier_RLH = torch.einsum("rle,leh->rlh", sources_RLE[:, :-1], before)
            hidden_RLH = hidden_RLH + F.pad(earlier_RLH, (0, 0, 1, 0))
        hidden_RLH = hidden_RLH + recent_RLH[:, ahead:] + parameters["bias"][number, ahead:]
        logits_RLE = torch.einsum("rlh,lhe->rle", hidden_RLH.relu(), parameters["out"][ahead:])
        logits_RLE = logits_RLE + parameters["out_bias"][number, ahead:]
        terms.append(F.binary_cross_entropy_with_logits(logits_RLE, visits_RLE[:, ahead:]))
    return torch.stack(terms).sum()
