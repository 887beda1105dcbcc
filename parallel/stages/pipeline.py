"""Micro-batches through the stages of a model, by torch.distributed.pipelining.

The library decides when a stage runs forward and backward of which micro-batch. It sends rows to
the next stage, and their gradients back. A stage gets the number of the micro-batch and fetches
the rest by itself, because every stage knows the data.

Two conventions of the library are changed here. It leaves gradients on the parameters until the
step ends; :class:`Stage` hands them over after each backward. It knows one loss, at the end of the
last stage; :func:`with_loss` gives other stages theirs.

T tokens of a micro-batch on this rank, D model width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ..mesh import Mesh
from ..watch.pulse import pulse
from .names import WAITING

SCHEDULES: dict[str, type[ScheduleGPipe] | type[Schedule1F1B]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
}


@dataclass(frozen=True, slots=True)
class RowShape:
    """What passes between stages: tensors ``[T, D]``, in each micro-batch the same."""

    tokens: int
    width: int
    taken: Sequence[torch.dtype]
    """Tensors from the stage before, by their type; none in the first."""
    given: Sequence[torch.dtype]
    """Tensors to the next stage; none in the last, which gives a loss."""

    def like(self, types: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
        """Return tensors without memory, one for each type."""
        size = self.tokens, self.width
        return tuple(
            torch.empty(size, dtype=dtype, device="meta", requires_grad=True) for dtype in types
        )


class Pipeline:
    """The stages of a model, of which this rank has one.

    ``module`` takes the rows of the stage before, and ``number``, an int64 tensor with the number
    of the micro-batch. It returns a tuple of rows for the next stage, or in the last one the loss.
    """

    def __init__(
        self,
        kind: Literal["gpipe", "1f1b"],
        module: nn.Module,
        shape: RowShape,
        count: int,
        mesh: Mesh,
        device: torch.device,
        after_backward: Callable[[], None],
    ) -> None:
        """Make it; ``count`` micro-batches are a step."""
        self._numbers = torch.arange(count)
        stage = Stage(module, shape, mesh, device, after_backward)
        self._stage = stage
        self._schedule = SCHEDULES[kind](stage, count, loss_fn=_same, scale_grads=False)

    def run(self) -> None:
        """Run forward and backward of all micro-batches of a step; all ranks call it."""
        self._stage.wait()
        try:
            self._schedule.step(number=self._numbers, target=self._numbers, return_outputs=False)
        except RuntimeError as error:
            cause = _cause_of(error)
            if cause is error:
                raise
            raise cause from None
        self._stage.go_on()


class Stage(PipelineStage):
    """This rank's stage.

    Between two computations it sends and receives. The watch then names :data:`WAITING` if another
    rank is lost. Shapes are given, so the library does not run the model to find them out.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: RowShape,
        mesh: Mesh,
        device: torch.device,
        after_backward: Callable[[], None],
    ) -> None:
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        super().__init__(
            module,
            mesh.pp_rank,
            mesh.pp_size,
            device,
            input_args=shape.like(shape.taken),
            output_args=shape.like(shape.given) or (loss,),
            group=mesh.pp_group,
        )
        self._after_backward = after_backward
        self._waiting: AbstractContextManager[None] | None = None

    def wait(self) -> None:
        """Note that this rank waits for others until the next computation."""
        self._waiting = pulse.in_collective(WAITING)
        self._waiting.__enter__()

    def go_on(self) -> None:
        """Note that it does not wait any more."""
        assert self._waiting is not None, "it waits between computations"
        self._waiting.__exit__(None, None, None)
        self._waiting = None

    def forward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        """Run forward of a micro-batch."""
        self.go_on()
        output = super().forward_one_chunk(*arguments, **options)
        self.wait()
        return output

    def backward_one_chunk(self, *arguments: Any, **options: Any) -> None:
        """Run backward of a micro-batch, and hand its gradients over."""
        self.go_on()
        super().backward_one_chunk(*arguments, **options)
        self._after_backward()
        self.wait()


def with_loss(x_TD: Tensor, loss: Tensor | None) -> Tensor:
    """Return ``x_TD``, whose backward also runs that of ``loss``, a scalar."""
    if loss is None:
        return x_TD
    joined_TD: Tensor = _WithLoss.apply(x_TD, loss)
    return joined_TD


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad_TD, ctx.one


def _same(loss: Tensor, _number: Tensor) -> Tensor:
    """Return the loss of a micro-batch: the last stage has computed it."""
    return loss


def _cause_of(error: BaseException) -> BaseException:
    """Return the error that the library has wrapped in its own, if it has."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error
