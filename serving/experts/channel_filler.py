"""Brings the channels that rows need into slots that hold an expert's gate.

A miss reads the gate. Then the gate is computed for the rows of the step, and only the channels
that some row needs are read, with their rows of up and columns of down. They stay in the slot; a
later step reads what is still missing. What other channels of a slot hold is finite and meets zeros
only.

N rows, D model width, K choices, F expert width, G groups of channels, n some experts.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.live_channels import live_channels
from ...kernels.values.channel_weights import ChannelExpertWeights
from ...moe.folders.channel_reads import ChannelReads, Run, runs_of
from .policies.policy import Key
from .reading.errors import read_error
from .reads import Read, Reads
from .tiers.channels import ChannelTier
from .tiers.disk import read_patiently
from .tiers.rates import Rates
from .traffic import StoreStatistics

REQUEST_S = 30e-6
"""What a request costs: a gap that the disk reads in less time is read along."""
RUNS_TOGETHER = 8
"""Runs that one thread reads, one after the other."""


@dataclass(frozen=True, slots=True)
class _Running:
    """Runs of channels on their way into a slot."""

    read: Read
    """Its parts are the runs that are still to be read."""
    runs: Sequence[Run]
    present_G: Tensor
    """The tier's when the read began; once the expert has left the slot, it is not used."""

    def brought(self) -> Sequence[Run]:
        """Return the runs that came, once the read is done: all of them, unless it failed."""
        return self.runs[: len(self.runs) - len(self.read.parts)]


class ChannelFiller:
    """Used by the compute thread, between two waves of a store."""

    def __init__(
        self,
        tier: ChannelTier,
        reads: Reads,
        statistics: StoreStatistics,
        rates: Rates,
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tier = tier
        self._files: ChannelReads = tier.files
        self._reads, self._statistics, self._clock = reads, statistics, clock
        self._rates = rates
        group_bytes = self._files.num_bytes(Run(0, 1))
        self.gap = int(REQUEST_S * bytes_per_s / group_bytes)
        """Groups between two wanted ones that are read along, at most."""
        self._running: list[_Running] = []
        """Reads that may still write into slots."""

    def waves(
        self,
        layer: int,
        ready: Sequence[int],
        experts: ChannelExpertWeights,
        rows: tuple[Tensor, Tensor] | None,
    ) -> Generator[list[int]]:
        """Yield the experts of ``ready``, whose gates are here, once their channels are, too.

        ``rows`` are ``x_ND`` and ``experts_NK`` of the step; None = all channels are needed. Those
        that lack nothing come first, while the channels of others are read. Raises
        :class:`ExpertReadError`.
        """
        self._finish()  # what an interrupt left running could write into slots of other experts
        lacking = [e for e in ready if not bool(self._tier.present_G[layer, e].all())]
        runs_of_expert = self._lacking_runs(layer, lacking, experts, rows)
        try:
            for expert, runs in runs_of_expert.items():
                for first in range(0, len(runs), RUNS_TOGETHER):
                    self._submit((layer, expert), runs[first : first + RUNS_TOGETHER])
            complete = [expert for expert in ready if expert not in runs_of_expert]
            if complete:
                yield complete
        finally:
            # Also when computing fails: no thread may write into a slot that is given away.
            failed = self._finish()
        if failed:
            raise read_error(failed)
        if runs_of_expert:
            yield list(runs_of_expert)

    def _lacking_runs(
        self,
        layer: int,
        lacking: list[int],
        experts: ChannelExpertWeights,
        rows: tuple[Tensor, Tensor] | None,
    ) -> dict[int, list[Run]]:
        """Return what must be read of experts that lack channels, if anything."""
        if not lacking:
            return {}
        live_nF = None if rows is None else live_channels(*rows, experts, lacking)
        if live_nF is None:
            live_nF = torch.ones(len(lacking), experts.fc2_SFD.shape[1], dtype=torch.bool)
        missing_nF = torch.nn.functional.pad(live_nF, (0, -live_nF.shape[1] % self._files.group))
        missing_nG = missing_nF.unflatten(1, (-1, self._files.group)).any(dim=2)
        found: dict[int, list[Run]] = {}
        for expert, missing_G in zip(lacking, missing_nG, strict=True):
            missing_G &= ~self._tier.present_G[layer, expert]
            groups = missing_G.nonzero().flatten().tolist()
            if groups:
                found[expert] = runs_of(groups, self.gap)
        return found

    def _submit(self, key: Key, runs: Sequence[Run]) -> None:
        """Start reading runs of channels into the slot of an expert."""
        views = self._tier.views[key]
        calls = (partial(self._files.read, key, run, views) for run in runs)
        parts: deque[Callable[[], None]] = deque(partial(read_patiently, call) for call in calls)
        read = Read(key, slot=-1, is_urgent=True, parts=parts)
        self._running.append(_Running(read, runs, self._tier.present_G[key]))
        self._reads.submit(read)

    def _finish(self) -> list[Read]:
        """Wait for the running reads and count what they brought; return those that failed.

        An interrupt while it waits leaves them to the next call.
        """
        if not self._running:
            return []
        started = self._clock()
        self._reads.wait_for_all([running.read for running in self._running])
        done, self._running = self._running, []
        layer, _ = done[0].read.key
        self._statistics.stall(layer, self._clock() - started)
        bytes_of: dict[Key, int] = {}
        for running in done:
            key = running.read.key
            for run in running.brought():
                running.present_G[run.start : run.end] = True
                bytes_of[key] = bytes_of.get(key, 0) + self._files.num_bytes(run)
        for key, num_bytes in bytes_of.items():
            self._statistics.fill(key, num_bytes)
            self._rates.add("disk", num_bytes)
        return [running.read for running in done if running.read.error is not None]
