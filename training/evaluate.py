"""Held-out loss."""

from dataclasses import dataclass

import torch

from ..parallel.mesh import Mesh
from .config import RunConfig
from .objectives.next_token import NextToken
from .setup import Data, device


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss on held-out text."""

    loss: float
    """Nats per token."""
    loss_per_byte: float
    """Nats per UTF-8 byte of the text."""
    num_tokens: int


def evaluate(objective: NextToken, data: Data, config: RunConfig, mesh: Mesh) -> HeldOut:
    """Score the first ``eval_sequences`` held-out windows, split over the ranks.

    All ranks run the same number of forwards, some perhaps with no rows, because experts on one
    rank serve tokens of another.
    """
    length, train = config.train.sequence_length, config.train
    num_windows = min(train.eval_sequences, data.held_out.num_windows)
    per_rank = max(1, train.batch_sequences // (train.accumulation * mesh.world_size))
    total = torch.zeros((), dtype=torch.float64)
    objective.eval()
    with torch.no_grad():
        for start in range(0, num_windows, per_rank * mesh.world_size):
            first = min(num_windows, start + mesh.rank * per_rank)
            windows = data.held_out.in_order(range(first, min(num_windows, first + per_rank)))
            total += objective(windows.to(device())).cross_entropy_sum.double().cpu()
    objective.train()
    num_tokens = num_windows * length
    loss = float(mesh.sum(total)) / num_tokens
    return HeldOut(loss, loss * data.tokens_per_byte, num_tokens)
