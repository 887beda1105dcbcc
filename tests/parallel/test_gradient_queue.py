"""The queue of dense gradients: slices in order, every byte once, and errors that end the step."""

import threading
import time

import pytest
import torch

from moeyard.parallel.dense.gradient_queue import GradientQueue
from moeyard.parallel.experts.lane import Lane

SIZES = (5, 1, 16, 7)


def gradients():
    """Return main gradients as backward makes them, all numbers different."""
    return list(torch.arange(1.0, sum(SIZES) + 1).split(SIZES))


class Sums:
    """The sums of two ranks that have the same gradients; it remembers what it has seen."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.threads: set[int] = set()

    def __call__(self, flat: torch.Tensor) -> "Doubling":
        self.seen.append(flat.tolist())
        self.threads.add(threading.get_ident())
        return Doubling(flat)


class Doubling:
    """A sum that ends when someone waits for it."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat

    def wait(self) -> None:
        self._flat *= 2


class Broken:
    """A sum that starts and then fails."""

    def __init__(self, _: torch.Tensor) -> None: ...

    def wait(self) -> None:
        raise RuntimeError("a rank is gone")


def broken_at_start(_: torch.Tensor) -> Broken:
    raise RuntimeError("a rank is gone")


@pytest.mark.parametrize("plan", [(), (0, 0, 0, 0), (20, 4, 60, 8), (17, 3, 61, 9), (0, 24, 92, 0)])
def test_slices_are_summed_in_order_and_every_number_once(plan):
    sums, lane = Sums(), Lane("test")
    queue = GradientQueue(sums)
    queue.way, queue.plan = ("planned" if plan else "at the end"), plan
    made = gradients()
    with queue.sends_all():
        for number in range(2):
            queue.add(made[2 * number : 2 * number + 2])
            for _ in range(2):
                queue.send_planned(lane.submit)
    assert [x for flat in sums.seen for x in flat] == list(range(1, sum(SIZES) + 1))
    assert torch.cat(made).tolist() == [2.0 * x for x in range(1, sum(SIZES) + 1)]
    planned = [number // 4 for number in plan if number >= 4]
    rest = sum(SIZES) - sum(planned)
    assert [len(flat) for flat in sums.seen] == [*planned, *([rest] if rest else [])]
    assert queue.queued_bytes == 4 * sum(SIZES)


def test_every_bucket_can_be_sent_at_once():
    sums, lane = Sums(), Lane("test")
    queue = GradientQueue(sums)
    queue.way = "at once"
    made = gradients()
    with queue.sends_all():
        for number in range(2):
            queue.add(made[2 * number : 2 * number + 2])
            assert len(sums.seen) == number + 1
            queue.send_planned(lane.submit)
    assert [len(flat) for flat in sums.seen] == [6, 23]
    assert torch.cat(made).tolist() == [2.0 * x for x in range(1, sum(SIZES) + 1)]
    assert queue.queued_bytes == 4 * sum(SIZES) and queue.backward_s > 0


def test_gradients_of_any_shape_come_back_as_their_sums():
    queue, lane = GradientQueue(Sums()), Lane("test")
    queue.way, queue.plan = "planned", (16,)
    matrix, vector = torch.ones(2, 3), torch.ones(2)
    with queue.sends_all():
        queue.add([matrix, vector])
        queue.send_planned(lane.submit)
    assert matrix.eq(2).all() and vector.eq(2).all()


def test_planned_slices_travel_in_the_lane_while_backward_goes_on():
    sums, lane = Sums(), Lane("test")
    queue = GradientQueue(sums)
    queue.way, queue.plan = "planned", (20,)
    with queue.sends_all():
        queue.add(gradients())
        queue.send_planned(lane.submit)
        lane.run(lambda: None)
        assert len(sums.seen) == 1 and threading.get_ident() not in sums.threads


def test_a_backward_that_sums_nothing_sends_nothing():
    sums, lane = Sums(), Lane("test")
    queue = GradientQueue(sums)
    queue.way, queue.plan = "planned", (4,)
    queue.send_planned(lane.submit)
    lane.run(lambda: None)
    assert not sums.seen


def test_a_plan_that_asks_for_gradients_that_are_not_there_ends_the_step():
    queue, lane = GradientQueue(Sums()), Lane("test")
    queue.way, queue.plan = "planned", (400,)
    with pytest.raises(AssertionError, match="do not exist yet"), queue.sends_all():
        queue.add(gradients())
        queue.send_planned(lane.submit)


@pytest.mark.parametrize("all_reduce", [Broken, broken_at_start])
@pytest.mark.parametrize("plan", [(20,), ()])
def test_an_error_of_a_slice_ends_the_step(plan, all_reduce):
    queue, lane = GradientQueue(all_reduce), Lane("test")
    queue.way, queue.plan = ("planned" if plan else "at the end"), plan
    with pytest.raises(RuntimeError, match="a rank is gone"), queue.sends_all():
        queue.add(gradients())
        queue.send_planned(lane.submit)


def test_an_error_of_backward_is_the_one_that_is_raised():
    queue = GradientQueue(Sums())
    with pytest.raises(ValueError, match="backward"), queue.sends_all():
        queue.add(gradients())
        raise ValueError("backward")
    assert not queue.is_open


def test_a_lane_knows_how_long_it_waited():
    lane, other, gate = Lane("test"), Lane("other"), threading.Event()
    lane.submit(gate.wait)  # the calls below follow each other without a gap
    before = lane.submit(lambda: lane.idle_s)
    slow = other.submit(lambda: gate.wait() and time.sleep(0.05))
    lane.submit(lambda: lane.wait(slow))
    waited = lane.submit(lambda: lane.idle_s)
    lane.submit(lambda: time.sleep(0.5))
    worked = lane.submit(lambda: lane.idle_s)
    gate.set()
    assert waited.result() - before.result() >= 0.04
    assert worked.result() - waited.result() < 0.25
