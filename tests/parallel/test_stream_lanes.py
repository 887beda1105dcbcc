"""Lanes of a GPU are streams: what is queued in which order, and who waits for whom.

A fake of torch.cuda stands for the device. Each of its streams knows how far it has waited for the
others, so a read that is not ordered after its write is seen.
"""

import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from moeyard.moe.routers.routing import Routing
from moeyard.parallel.experts import pipelined
from moeyard.parallel.experts.exchange import Splits
from moeyard.parallel.experts.hop import Level
from moeyard.parallel.experts.lane import Lane
from moeyard.parallel.experts.pipelined import Degrees, PipelinedPath
from moeyard.parallel.experts.stream_lane import StreamLane


class Event:
    def __init__(self, known):
        self.known = known

    def query(self):
        return False


class Stream:
    """``known[s]``: the work of stream s that is done before this one goes on."""

    def __init__(self):
        self.known = Counter()

    def wait_event(self, event):
        self.known |= event.known

    def wait_stream(self, other):
        self.known |= other.known

    def record_event(self):
        return Event(Counter(self.known))


class Cuda:
    """Stands for torch.cuda."""

    Stream = Stream

    def __init__(self):
        self.main = Stream()
        self._current = [self.main]

    def current_stream(self):
        return self._current[-1]

    @contextmanager
    def stream(self, stream):
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def work(self):
        stream = self.current_stream()
        stream.known[stream] += 1
        return stream


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU and keeps which streams use it."""

    is_cuda = True

    def record_stream(self, stream):
        self.streams = [*getattr(self, "streams", []), stream]


def on_gpu():
    return torch.zeros(2).as_subclass(OnGpu)


def test_a_lane_waits_for_the_caller_and_the_reader_for_the_lane():
    cuda = Cuda()
    lane = StreamLane(cuda)
    cuda.work()
    streams = []

    def call(number):
        streams.append(cuda.work())
        return number

    queued = lane.submit(call, 3)
    assert not queued.done() and cuda.main.known[streams[0]] == 0
    assert streams[0].known[cuda.main] == 1
    cuda.work()
    assert queued.result() == 3
    assert cuda.main.known[streams[0]] == 1 and streams[0] is not cuda.main
    assert lane.run(lambda: call(4)) == 4 and streams[1] is streams[0]
    assert streams[0].known[cuda.main] == 2


def test_a_lane_waits_for_the_other_whose_result_it_takes():
    cuda = Cuda()
    first, second = StreamLane(cuda), StreamLane(cuda)
    queued = first.submit(cuda.work)
    found = second.submit(lambda: (second.wait(queued), cuda.work()))
    sender, receiver = found.result()
    assert sender is not receiver
    assert receiver.known[sender] == 1


def test_memory_is_kept_for_every_stream_that_uses_it():
    cuda = Cuda()
    lane, other = StreamLane(cuda), StreamLane(cuda)
    sent, made, kept = on_gpu(), on_gpu(), on_gpu()

    def call(columns):
        assert columns[0][0] is sent
        return {3: [made]}, kept

    queued = lane.submit(call, [[sent, 7]])
    assert sent.streams == [lane._stream]
    queued.result()
    assert made.streams == kept.streams == [cuda.main]
    other.submit(lambda: other.wait(queued))
    assert made.streams[1:] == [other._stream, other._stream]


def test_an_error_is_raised_at_once_and_leaves_the_callers_stream():
    cuda = Cuda()
    with pytest.raises(ZeroDivisionError):
        StreamLane(cuda).submit(lambda: 1 // 0)
    assert cuda.current_stream() is cuda.main


T, K, D = 8, 2, 3


class Loopback:
    """The exchange of a group of one rank; each message is work of the stream that sends it."""

    def __init__(self, cuda):
        self.cuda, self.streams, self.threads = cuda, [], set()

    def splits(self, send_CP):
        return [Splits([counts]) for counts in send_CP]

    def rows(self, columns, splits, order=None):
        self.streams.append(self.cuda.work())
        self.threads.add(threading.current_thread())
        return [[column] for column in columns]


def outcome(levels, degrees, cuda):
    """Return the values and gradients of a path, and the exchanges of its levels."""
    exchanges = [Loopback(cuda) for _ in range(levels)]
    path = PipelinedPath(
        [Level(exchange, 0, 1, rank_of=torch.zeros_like) for exchange in exchanges], degrees
    )
    chunks = []

    def experts(x_ND, experts_NK, weights_NK, most_choices):
        chunks.append(Counter(cuda.main.known))
        assert cuda.work() is cuda.main
        return x_ND.cos() * weights_NK.sum(dim=1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator, requires_grad=True)
    weights_TK = torch.rand(T, K, generator=generator, requires_grad=True)
    none = torch.tensor(0)
    routing = Routing(torch.zeros(T, K, dtype=torch.int32), weights_TK, none, none)
    y_TD = path.run(x_TD, routing, experts, lambda: x_TD.sin())
    y_TD.square().sum().backward()
    return (y_TD, x_TD.grad, weights_TK.grad), exchanges, chunks


@pytest.mark.parametrize("levels", [1, 2])
def test_streams_carry_what_threads_do_and_each_chunk_waits_for_its_rows_only(monkeypatch, levels):
    degrees = Degrees(4, 2)
    expected, _, _ = outcome(levels, degrees, Cuda())
    cuda = Cuda()
    monkeypatch.setattr(pipelined, "open_lane", lambda name: StreamLane(cuda))
    found, exchanges, chunks = outcome(levels, degrees, cuda)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)
    used = [set(exchange.streams) for exchange in exchanges]
    assert all(len(streams) == 1 and cuda.main not in streams for streams in used)
    assert len(set.union(*used)) == levels
    assert {t for e in exchanges for t in e.threads} == {threading.current_thread()}
    (last,) = used[-1]
    # Messages of forward there come first, so chunk n has waited for n + 1 of them.
    assert [known[last] for known in chunks] == [1, 2, 3, 4]


def test_a_machine_without_gpus_has_threads():
    level = Level(Loopback(Cuda()), 0, 1, rank_of=torch.zeros_like)
    assert all(isinstance(lane, Lane) for lane in PipelinedPath([level]).lanes)
