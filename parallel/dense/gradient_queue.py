"""Dense gradients wait in a queue, and travel in the slices that a plan asks for.

FSMoE (Pan et al. 2025): the link between nodes has free time while MoE layers run backward. A plan
(planning/gradient_partition.py) says how many bytes to send at each of these times. The queue can
also send each of DDP's buckets at once, as DDP does, or everything at the end.

A slice starts when the rows before it have arrived. Rows after it do not wait for it: if it is
still on its way, they share the link. So a rank that is late delays only what needs it.

All ranks must sum the same slices in the same order. So what is sent depends on the plan only,
never on how fast a rank is:

- Backward makes gradients in the order of the graph, which is the same on all ranks, and DDP hands
  over its buckets in one order, which rank 0 has told the others.
- A time to send is a place in that order: the same gradients wait there in every step. A plan asks
  for no more of them. If fewer are there, it is a bug, and the step ends instead of waiting.
- One thread starts all slices of a backward: the lane of the link, or backward's own where they
  are sent at once. Nothing else uses the group of the sums until backward has ended.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

Way = Literal["at the end", "at once", "planned"]
"""When gradients are sent."""


class Work(Protocol):
    """A sum over ranks that has started."""

    def wait(self) -> object:
        """Return when it has ended; raise its error."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Gradients that travel together."""

    parts: list[Tensor]
    flat: Tensor
    work: Work

    def finish(self) -> None:
        """Wait for the sums and write them to where the gradients were."""
        self.work.wait()
        if len(self.parts) > 1:
            sizes = [part.numel() for part in self.parts]
            for part, total in zip(self.parts, self.flat.split(sizes), strict=True):
                part.copy_(total)


class Starting(Protocol):
    """A slice that a lane starts."""

    def result(self) -> Slice:
        """Return the slice, which has started then."""


Submit = Callable[[Callable[[], Slice]], Starting]
"""Runs a call next to this thread, after all those submitted before."""


class GradientQueue:
    """Gradients in the order in which backward makes them, not yet summed over ranks.

    ``all_reduce`` starts to sum a flat tensor over all ranks, in place.
    """

    def __init__(self, all_reduce: Callable[[Tensor], Work]) -> None:
        self.way: Way = "at the end"
        """May change between steps, to the same on all ranks."""
        self.plan: Sequence[int] = ()
        """Bytes to send at each call of :meth:`send_planned` in a planned backward, and the rest at
        its end. The same on all ranks."""
        self.is_open = False
        """Whether a backward runs whose gradients are summed."""
        self.queued_bytes = 0
        """What has been added in this backward, or in the last one."""
        self.complete_at_s = 0.0
        """When backward had made all gradients, by ``time.perf_counter``."""
        self.backward_s = 0.0
        """Seconds of the last backward, until all sums were there."""
        self._all_reduce = all_reduce
        self._waiting: deque[Tensor] = deque()
        self._started: list[Slice] = []
        self._travelling: list[Starting] = []
        self._number = 0
        """Calls of :meth:`send_planned` in this backward."""

    @contextmanager
    def sends_all(self) -> Iterator[None]:
        """Queue the gradients of a backward that runs inside; at the end all of them are summed.

        An error of a slice is raised here.
        """
        for found in (self._waiting, self._started, self._travelling):
            found.clear()
        began_s = time.perf_counter()
        self.is_open, self._number, self.queued_bytes = True, 0, 0
        try:
            yield
        finally:
            self.is_open = False
        self.complete_at_s = time.perf_counter()
        slices = [*self._started, *(future.result() for future in self._travelling)]
        if self._waiting:
            slices.append(self._start(list(self._waiting)))
        for one in slices:
            one.finish()
        self.backward_s = time.perf_counter() - began_s

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Queue gradients, contiguous and of one type. They stay as they are until they are summed.

        The caller adds nothing to them after this.
        """
        parts = [gradient.view(-1) for gradient in gradients]
        self.queued_bytes += sum(part.nbytes for part in parts)
        if self.way == "at once":
            self._started.append(self._start(parts))
        else:
            self._waiting += parts

    def send_planned(self, submit: Submit) -> None:
        """Submit the next slice of the plan, if a backward runs that sums gradients."""
        if not self.is_open or self.way != "planned":
            return
        number, self._number = self._number, self._number + 1
        assert number < len(self.plan), "the plan is for another number of layers"
        parts = self._taken(self.plan[number])
        if parts:
            self._travelling.append(submit(partial(self._start, parts)))

    def _taken(self, num_bytes: int) -> list[Tensor]:
        """Take ``num_bytes``, rounded down to whole numbers, from the front of the queue."""
        parts: list[Tensor] = []
        left = num_bytes // self._waiting[0].element_size() if self._waiting else num_bytes
        while left:
            assert self._waiting, "the plan asks for gradients that do not exist yet"
            first = self._waiting.popleft()
            parts.append(first[:left])
            if left < first.numel():
                self._waiting.appendleft(first[left:])
            left -= parts[-1].numel()
        return parts

    def _start(self, parts: list[Tensor]) -> Slice:
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Slice(parts, flat, self._all_reduce(flat))
