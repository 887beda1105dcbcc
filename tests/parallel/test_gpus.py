"""Which GPU a rank takes, and how a rank with GPUs ends; without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moeyard.errors import ConfigError, Stopped, TrainingError
from moeyard.parallel import gpus, process
from moeyard.training import program


class OneWatch:
    """Stands for the watch of rank 0 of two; what the other rank says is given."""

    def __init__(self, other):
        self.other, self.told = other, []

    def gather(self, value):
        return [value, self.other]

    def on_rank_0(self, action):
        return action()

    def where(self, rank):
        return f"rank {rank} on node0 (process 7)"

    def wait_for_all(self, stop):
        pass

    def leave(self):
        self.told.append("left")

    def explain(self, error):
        return None

    def fail(self, error):
        self.told.append(str(error))

    def close(self):
        self.told.append("closed")


@pytest.fixture
def taken(monkeypatch):
    """Pretend that there are GPUs; return how to take one, and the numbers taken."""
    numbers = []

    def take(local_rank, count, other="gpu-9"):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"gpu-{n}")
        )
        monkeypatch.setattr(torch.cuda, "set_device", numbers.append)
        gpus.take_gpu(OneWatch(other))
        return numbers

    return take


def test_each_rank_of_a_host_takes_the_gpu_of_its_number(taken):
    assert taken(1, 2) == [1]


def test_a_rank_that_sees_one_gpu_takes_it_whatever_its_number_is(taken):
    """As with Slurm's --gpus-per-task=1."""
    assert taken(3, 1) == [0]


def test_no_gpu_is_no_problem(taken):
    assert taken(1, 0, other=gpus.NO_GPU) == []


@pytest.mark.parametrize(
    ("local_rank", "count", "other"), [(0, 1, "gpu-0"), (0, 2, gpus.NOT_ENOUGH), (2, 2, "gpu-1")]
)
def test_ranks_without_a_gpu_for_themselves_are_refused_before_any_work(
    taken, local_rank, count, other
):
    with pytest.raises(ConfigError, match=r"rank [01] on node0 .* has no GPU for itself; start"):
        taken(local_rank, count, other)


@pytest.mark.parametrize(
    ("error", "has_gpus", "destroys"),
    [
        (None, True, True),
        (Stopped("stopped by SIGTERM."), True, True),
        (ValueError("wrong"), True, False),
        (ValueError("wrong"), False, True),
    ],
)
def test_a_rank_that_fails_on_gpus_does_not_wait_for_the_others(
    monkeypatch, error, has_gpus, destroys
):
    """destroy_process_group is collective with NCCL, and the others are elsewhere."""
    watch, ended = OneWatch("gpu-9"), []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process, "is_torchrun_worker", lambda: True)
    monkeypatch.setattr(process, "_join", lambda *_: (None, watch))
    monkeypatch.setattr(process, "_init", lambda *_: None)
    monkeypatch.setattr(process, "take_gpu", lambda watch: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(dist, "is_initialized", lambda: not ended)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))

    def run():
        with process.process_group(1.0):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert bool(ended) == destroys
    assert watch.told == ["left" if error is None else str(error), "closed"]


MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.1 GiB of "
    "which 1.2 GiB is free."
)


def test_a_full_gpu_is_one_sentence():
    with (
        pytest.raises(TrainingError, match=r"\(Tried to allocate 20.00 GiB\); raise train.accum"),
        program._memory_of_a_gpu(),
    ):
        raise torch.OutOfMemoryError(MESSAGE)
