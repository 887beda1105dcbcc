"""The core channels of a text: those that its prompt used most are all that its answer uses.

After CoreInfer (arXiv 2410.18311), with experts in place of whole MLPs. A prompt is computed with
all channels. The core of one of its tokens in an expert are the channels with the largest values
between the expert's products; the core of the text are those that were in the core of most of
the tokens that visited this expert. It is fixed for the answer, so nothing is decided token by
token.

The paper takes the largest positive values. Here their size counts: with a gate, the sign is that
of up and says nothing of what a channel adds.

E experts, F expert width, K choices, n rows of a text, r = n*K routed rows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import LayerExperts

TOKEN_SHARE = 0.4
"""Share of an expert's channels that are the core of a token."""
FEWEST_ROWS = 4
"""An expert that fewer tokens of the prompt visited has no core: answers use all its channels."""


@dataclass(slots=True)
class CoreMode:
    """That a decoder's answers use core channels, and how many they have used."""

    share: float
    """Of an expert's channels that are the core of a text, 0 to 1."""
    num_experts: int
    d_expert: int
    num_used: int = 0
    """Channels that the rows of answers have used, in all experts that they chose.

    Every row that was computed counts: also guesses that were rejected, and steps that were
    repeated.
    """
    num_offered: int = 0
    """Channels of these experts."""

    @property
    def share_used(self) -> float:
        """The share of channels that rows of answers have used so far; 1 before the first."""
        return self.num_used / self.num_offered if self.num_offered else 1.0

    def count(self, used_rF: Tensor, experts_r: Tensor) -> None:
        """Take note of what rows of answers use."""
        is_there_r1 = (experts_r >= 0).unsqueeze(1)
        self.num_used += int((used_rF & is_there_r1).sum())
        self.num_offered += int(is_there_r1.sum()) * self.d_expert


class CoreChannels:
    """The core channels of one text in all layers.

    A position is counted once in each layer, so a forward may be repeated, and a text may be read
    again. The result depends neither on the order of a prompt's tokens nor on the chunks in which
    they came.
    """

    def __init__(self, mode: CoreMode, num_prompt: int) -> None:
        self.mode = mode
        self.num_prompt = num_prompt
        """Rows before this position are computed with all channels, and counted."""
        self._layers: dict[LayerExperts, _Layer] = {}

    def num_uncounted(self, layer: LayerExperts, start: int, end: int) -> int:
        """Return how many of the positions from ``start`` to ``end`` must still be counted.

        They are the last ones of those that belong to the prompt.
        """
        counted = self._layers[layer].num_counted if layer in self._layers else 0
        return max(0, min(end, self.num_prompt) - max(start, counted))

    def see(self, layer: LayerExperts, experts_r: Tensor, act_rF: Tensor, num_rows: int) -> None:
        """Count the next ``num_rows`` rows of the prompt: their experts, and their channels."""
        if layer not in self._layers:
            self._layers[layer] = _Layer(self.mode)
        own = self._layers[layer]
        own.count(experts_r, act_rF)
        own.num_counted += num_rows
        if own.num_counted == self.num_prompt:
            own.decide(self.mode.share)

    def used(self, layer: LayerExperts, experts_r: Tensor) -> Tensor:
        """Return the channels that rows of the answer use in their experts, bool ``[r, F]``."""
        used_EF = self._layers[layer].used_EF
        assert used_EF is not None, "the prompt has not been read"
        used_rF = used_EF.index_select(0, experts_r.clamp(min=0))
        self.mode.count(used_rF, experts_r)
        return used_rF


@dataclass(slots=True)
class _Layer:
    """What the prompt did in one layer."""

    mode: CoreMode
    num_counted: int = 0
    rows_E: Tensor = field(init=False)
    """Rows that visited an expert."""
    counts_EF: Tensor = field(init=False)
    """Rows that had a channel in their core."""
    peaks_EF: Tensor = field(init=False)
    """The largest size of a channel, which decides between equal counts."""
    used_EF: Tensor | None = None
    """bool: the core, and all channels of an expert that has none."""

    def __post_init__(self) -> None:
        shape = (self.mode.num_experts, self.mode.d_expert)
        self.rows_E = torch.zeros(shape[0], dtype=torch.int32)
        self.counts_EF = torch.zeros(shape, dtype=torch.int32)
        self.peaks_EF = torch.zeros(shape)

    def count(self, experts_r: Tensor, act_rF: Tensor) -> None:
        """Add rows; those without an expert (-1) are left out."""
        is_there_r = experts_r >= 0
        experts_r, sizes_rF = experts_r[is_there_r].long(), act_rF[is_there_r].float().abs()
        index_rF = experts_r.unsqueeze(1).expand_as(sizes_rF)
        core_rF = core_of_rows(sizes_rF).int()
        self.rows_E.scatter_add_(0, experts_r, torch.ones_like(experts_r, dtype=torch.int32))
        self.counts_EF.scatter_add_(0, index_rF, core_rF)
        self.peaks_EF.scatter_reduce_(0, index_rF, sizes_rF, "amax")

    def decide(self, share: float) -> None:
        """Fix the core; the counts are not needed any more."""
        self.used_EF = core_of_text(self.counts_EF, self.peaks_EF, share)
        self.used_EF[self.rows_E < FEWEST_ROWS] = True
        del self.rows_E, self.counts_EF, self.peaks_EF


def core_of_rows(sizes_rF: Tensor) -> Tensor:
    """Return the core of each row, bool: its largest channels, and those as large as the last."""
    count = max(1, round(TOKEN_SHARE * sizes_rF.shape[1]))
    least_r1 = sizes_rF.topk(count, dim=1).values[:, -1:]
    return (sizes_rF >= least_r1) & (sizes_rF > 0)


def core_of_text(counts_EF: Tensor, peaks_EF: Tensor, share: float) -> Tensor:
    """Return the channels with the highest counts of each expert, bool; at least one.

    Of equal counts the higher peak comes first, then the lower number.
    """
    num_core = max(1, round(share * counts_EF.shape[1]))
    by_peak_EF = peaks_EF.argsort(dim=1, descending=True, stable=True)
    counts_EF = counts_EF.gather(1, by_peak_EF)
    order_EF = by_peak_EF.gather(1, counts_EF.argsort(dim=1, descending=True, stable=True))
    used_EF = torch.zeros_like(peaks_EF, dtype=torch.bool)
    return used_EF.scatter_(1, order_EF[:, :num_core], True)
