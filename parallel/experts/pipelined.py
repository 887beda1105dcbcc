"""Rows travel to their experts in chunks, so that links and compute work at the same time.

FSMoE (Pan et al. 2025): while the experts compute one chunk of a layer's rows, the next chunk is on
its way to them and the last one on its way back. Each level of ranks has a lane, and the calling
thread computes. With two levels, between nodes and inside a node, three resources work at once.
Where nothing can overlap, the calling thread also sends. On a GPU a lane is a stream
(stream_lane.py).

T tokens here, K choices, D model width, C chunks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...moe.experts.base import LayerExperts
from ...moe.experts.path import Beside
from ...moe.routers.routing import Routing
from .chunk_graph import ChunkGraph
from .gather import gather
from .hop import Columns, Hop, Level, send, send_back
from .lane import DirectLane, Pending
from .stopwatch import Observe, timed
from .stream_lane import AnyLane, open_lane

Arriving = Pending[list[Columns]]
"""What a message will bring, by chunk."""
AroundBackward = Callable[[], AbstractContextManager[object]]
"""Makes the context in which a layer's backward runs."""
Fill = Callable[[AnyLane], None]
"""May submit other traffic to the first lane, the same on every rank."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """Into how many messages a layer's rows are cut, in each direction."""

    forward: int = 1
    backward: int = 1

    @property
    def chunks(self) -> int:
        """The pieces that experts compute, fine enough for both directions."""
        return math.lcm(self.forward, self.backward)


class PipelinedPath:
    """Rows travel over one or more levels of ranks, in chunks; see the top of the file.

    Layers share one path: their turns follow each other on every rank. ``degrees`` may change
    between steps, to the same values on every rank. Each row's result is the same for any degrees;
    gradients of experts are sums over chunks and differ in the order of summation.
    """

    def __init__(self, levels: Sequence[Level], degrees: Degrees | None = None) -> None:
        self.levels = tuple(levels)
        self.lanes = [open_lane(f"level-{number}") for number in range(len(self.levels))]
        self.degrees = degrees or Degrees()
        self.fill: Fill | None = None
        """Called twice in each backward: after the last dispatch, and after the last combine."""
        self.observe: Observe | None = None
        """Called after each "forward" and "backward" of training with its seconds, which are to be
        read after the step."""

    def gather(self, values: Tensor) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`."""
        for level, lane in reversed(tuple(zip(self.levels, self.lanes, strict=True))):
            values = gather(values, level.exchange, level.size, lane.run)
        return values

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`; parts are added in rank order."""
        return self.run_over(self.levels, x_TD, routing, experts, beside)

    def run_over(
        self,
        levels: Sequence[Level],
        x_TD: Tensor,
        routing: Routing,
        experts: LayerExperts,
        beside: Beside | None = None,
        around_backward: AroundBackward = nullcontext,
    ) -> Tensor:
        """Run over other ``levels`` of the same ranks; backward runs inside ``around_backward``."""
        assert len(levels) == len(self.lanes), "each level has a lane"
        turn = _Turn(self, levels, experts, beside, around_backward)
        # The anchor makes the result need a gradient where only experts do.
        anchor = torch.empty(0, device=x_TD.device, requires_grad=turn.has_grad)
        y_TD: Tensor = _Run.apply(x_TD, routing.weights_TK, routing.experts_TK, anchor, turn)
        return y_TD if turn.shared_TD is None else y_TD + turn.shared_TD


class _Run(torch.autograd.Function):
    """A turn, to autograd."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, experts_TK, anchor, turn):  # type: ignore[no-untyped-def]
        ctx.turn = turn
        with timed(turn.observe, "forward", x_TD.device):
            return turn.forward(x_TD, weights_TK, experts_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        turn = ctx.turn
        with turn.around_backward(), timed(turn.observe, "backward", grad_TD.device):
            grad_x_TD, grad_weights_TK = turn.backward(grad_TD)
        return grad_x_TD, grad_weights_TK, None, None, None


class _Turn:
    """One forward of one layer, and its backward."""

    def __init__(
        self,
        path: PipelinedPath,
        levels: Sequence[Level],
        experts: LayerExperts,
        beside: Beside | None,
        around_backward: AroundBackward,
    ) -> None:
        self.has_grad = torch.is_grad_enabled()
        self.around_backward = around_backward
        self.shared_TD: Tensor | None = None
        """What ``beside`` returned."""
        self.observe = path.observe if self.has_grad else None
        self._levels, self._degrees = levels, path.degrees
        self._experts, self._beside = experts, beside
        self._fill = None if path.fill is None else partial(path.fill, path.lanes[0])
        overlaps = self._degrees.chunks > 1 or beside is not None or path.fill is not None
        self._lanes: Sequence[AnyLane | DirectLane] = (
            path.lanes if overlaps else [DirectLane() for _ in levels]
        )
        self._hops: list[list[Hop]] = []
        """By level and chunk."""
        self._graphs: list[ChunkGraph] = []
        """By chunk, until backward has used it."""

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Return the sums of the experts, ``[T, D]``."""
        chunks = self._degrees.chunks
        experts = experts_TK.tensor_split(chunks)
        rows = zip(x_TD.tensor_split(chunks), weights_TK.tensor_split(chunks), strict=True)
        columns = [list(pair) for pair in rows]
        # A group is used by its lane only, so that all ranks use it in the same order.
        planned = self._lanes[0].submit(self._levels[0].plan, experts)
        self._hops = [planned.result(), *([] for _ in self._levels[1:])]
        messages = list(self._messages(self._degrees.forward))
        arriving = self._there(messages, columns, is_first=True)
        if self._beside is not None:
            with torch.set_grad_enabled(self.has_grad):
                self.shared_TD = self._beside()
        returning = []
        for part, future in zip(messages, arriving, strict=True):
            arrived = future.result()
            hops = self._hops[-1][part]  # planned by then
            results = [
                [self._compute(columns, hop.num_choices)]
                for hop, columns in zip(hops, arrived, strict=True)
            ]
            returning.append(self._back(part, results))
        return torch.cat([y_TD for future in returning for (y_TD,) in future.result()])

    def backward(self, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the rows and of the routing weights."""
        grads = [[grad] for grad in grad_TD.tensor_split(self._degrees.chunks)]
        messages = list(self._messages(self._degrees.backward))
        arriving = self._there(messages, grads, is_first=False)
        if self._fill is not None:
            self._fill()
        returning = []
        for part, future in zip(messages, arriving, strict=True):
            graphs = zip(self._graphs[part], future.result(), strict=True)
            returning.append(self._back(part, [graph.backward(*grad) for graph, grad in graphs]))
        if self._fill is not None:
            self._fill()
        self._graphs.clear()
        parts = [columns for future in returning for columns in future.result()]
        grad_x_TD, grad_weights_TK = (torch.cat(column) for column in zip(*parts, strict=True))
        return grad_x_TD, grad_weights_TK

    def _messages(self, degree: int) -> Iterator[slice]:
        """Yield the chunks of each message."""
        width = self._degrees.chunks // degree
        for first in range(0, self._degrees.chunks, width):
            yield slice(first, first + width)

    def _there(
        self, messages: list[slice], chunks: list[Columns], is_first: bool
    ) -> list[Arriving]:
        """Send messages over all levels, one level after the other; the ``is_first`` ones are
        planned on their way."""
        first = self._lanes[0]
        arriving: list[Arriving] = [
            first.submit(send, self._hops[0][part], chunks[part], is_first) for part in messages
        ]
        for level, lane in enumerate(self._lanes[1:], start=1):
            arriving = [
                lane.submit(self._onward, level, part, future, is_first)
                for part, future in zip(messages, arriving, strict=True)
            ]
        return arriving

    def _onward(self, level: int, part: slice, arriving: Arriving, is_first: bool) -> list[Columns]:
        """Send what a message brought over the next level."""
        columns = self._lanes[level].wait(arriving)
        if is_first:
            experts = [chunk.pop() for chunk in columns]
            self._hops[level] += self._levels[level].plan(experts)
        return send(self._hops[level][part], columns, is_first)

    def _back(self, part: slice, columns: list[Columns]) -> Arriving:
        """Send results back over all levels; rows are summed at each."""
        begun: Future[list[Columns]] = Future()
        begun.set_result(columns)
        future: Arriving = begun
        for level in reversed(range(len(self._lanes))):
            future = self._lanes[level].submit(self._home, level, part, future)
        return future

    def _home(self, level: int, part: slice, arriving: Arriving) -> list[Columns]:
        columns = self._lanes[level].wait(arriving)
        return send_back(self._hops[level][part], columns)

    def _compute(self, columns: Columns, num_choices: int) -> Tensor:
        """Run the experts here on a chunk, and keep its graph."""
        x_ND, weights_NK, experts_NK = columns
        if not self.has_grad:
            y_ND: Tensor = self._experts(x_ND, experts_NK, weights_NK, num_choices)
            return y_ND
        with torch.enable_grad():
            x_ND, weights_NK = x_ND.requires_grad_(), weights_NK.requires_grad_()
            y_ND = self._experts(x_ND, experts_NK, weights_NK, num_choices)
        self._graphs.append(ChunkGraph(x_ND, weights_NK, y_ND))
        return y_ND.detach()
