"""A lane on a GPU: a stream of CUDA instead of a thread.

The host only queues work, so it needs no thread to go on while a message travels. The calling
thread queues all of it, in an order that is the same on every rank. NCCL asks for that where
several of its groups work at once: two ranks that start two groups' messages in different orders
may wait for each other forever. Threads would start them in any order.

Memory: torch's allocator gives a freed tensor's place to the next one of the same stream, because a
stream runs in order. A tensor that another stream also uses is kept until that one is done with it
(``record_stream``).
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .lane import Lane, Pending

Result = TypeVar("Result")


class StreamLane:
    """Runs each call at once, in the thread that submits it, with a stream for what it queues.

    The stream first waits for what the caller's stream has been given so far. ``cuda`` is
    ``torch.cuda``, or stands for it in tests.
    """

    idle_s = 0.0
    """See :class:`.lane.Lane`; the host does not know how long a stream waits."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._stream = cuda.Stream()

    def submit(self, call: Callable[..., Result], *arguments: Any) -> "Queued[Result]":
        """Queue the work of a call after that of all earlier ones.

        The tensors of ``arguments`` may be dropped by the caller before the stream is done.
        """
        self._stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(self._stream):
            _used_in(self._stream, arguments)
            result = call(*arguments)
            return Queued(result, self._stream.record_event(), self._cuda)

    def run(self, call: Callable[[], Result]) -> Result:
        """Return the result of ``call``, whose work comes after that of all earlier ones."""
        return self.submit(call).result()

    def wait(self, future: Pending[Result]) -> Result:
        """Return another lane's result, to a call in this one."""
        result = future.result()
        _used_in(self._stream, result)
        return result


class Queued(Generic[Result]):
    """The result of a call whose work is in a stream, perhaps not yet done."""

    def __init__(self, result: Result, is_done: Any, cuda: Any) -> None:
        self._result, self._is_done, self._cuda = result, is_done, cuda

    def result(self) -> Result:
        """Return the result, for use in the current stream, which waits; the host does not."""
        stream = self._cuda.current_stream()
        stream.wait_event(self._is_done)
        _used_in(stream, self._result)
        return self._result

    def done(self) -> bool:
        """Say whether the work is done."""
        return bool(self._is_done.query())


AnyLane = Lane | StreamLane


def open_lane(name: str) -> AnyLane:
    """Return a lane for messages of this rank: a stream where it has a GPU, else a thread."""
    return StreamLane() if torch.cuda.is_available() else Lane(name)


def _used_in(stream: Any, value: object) -> None:
    """Tell the allocator that ``stream`` uses the tensors in a value."""
    for tensor in _tensors(value):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples and dictionaries, and those of dataclasses in them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
        yield from (part for part in parts if isinstance(part, Tensor))
