"""Low-rank updates of experts: ``s B A`` next to each matrix (LoRA, Hu et al. 2021).

S slots, D model width, F expert width, P rank, Q outputs, I inputs. H rows of fc1. Without a
gate 2F means F, and 2P means P.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """The update of one matrix in every slot."""

    a_SPI: Tensor
    b_SQP: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """Low-rank updates of every slot; gate (if any), up and down have an A and a B each."""

    fc1_a_S2PD: Tensor
    """A of the gate first, then of up."""
    fc1_b_SHP: Tensor
    """B of the gate first, then of up."""
    fc2_a_SPF: Tensor
    fc2_b_SDP: Tensor
    scale: float
    """s, the factor on ``B A``."""

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The A and B of fc1 and of fc2."""
        return self.fc1_a_S2PD, self.fc1_b_SHP, self.fc2_a_SPF, self.fc2_b_SDP

    def first(self) -> Update:
        """Return fc1's update as one of rank 2P: gate and up read the same rows, so their A are one
        matrix, and their B the blocks of one, ``[S, 2F, 2P]``."""
        if self.fc1_a_S2PD.shape[1] == self.fc2_a_SPF.shape[1]:  # up alone
            return Update(self.fc1_a_S2PD, self.fc1_b_SHP, self.scale)
        num_slots, d_hidden, rank = self.fc1_b_SHP.shape
        half = d_hidden // 2
        blocks_SH2P = self.fc1_b_SHP.new_zeros(num_slots, d_hidden, 2 * rank)
        blocks_SH2P[:, :half, :rank] = self.fc1_b_SHP[:, :half]
        blocks_SH2P[:, half:, rank:] = self.fc1_b_SHP[:, half:]
        return Update(self.fc1_a_S2PD, blocks_SH2P, self.scale)

    def second(self) -> Update:
        """Return fc2's update."""
        return Update(self.fc2_a_SPF, self.fc2_b_SDP, self.scale)


def without_blocks(blocks_SH2P: Tensor, rank: int) -> Tensor:
    """Return fc1's B, ``[S, H, P]``, from the blocks of :meth:`LowRank.first`."""
    if blocks_SH2P.shape[2] == rank:  # up alone
        return blocks_SH2P
    gate_SF2P, up_SF2P = blocks_SH2P.chunk(2, dim=1)
    return torch.cat((gate_SF2P[..., :rank], up_SF2P[..., rank:]), dim=1)
