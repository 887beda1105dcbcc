"""The learning rate over a run, and that a resumed run takes the same."""

import itertools
import json
import math
from pathlib import Path

import pytest

from moeyard.configuration import validate_config
from moeyard.errors import ConfigError
from moeyard.parallel.mesh import Mesh
from moeyard.training.optimizers.config import OptimizerConfig
from moeyard.training.read_config import read_run_config
from moeyard.training.schedule import learning_rate
from moeyard.training.trainer import Trainer

SCHEDULES = ("cosine", "linear", "wsd")


def rates(steps=24, **given):
    values = {"lr": 1.0, "warmup_steps": 4, "min_lr_ratio": 0.1, **given}
    config = validate_config(OptimizerConfig, values)
    return [learning_rate(config, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_warms_up_and_would_reach_the_least_rate_one_after_the_last_step(schedule):
    found = rates(schedule=schedule)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(found[4:]))
    assert found[-2] > 0.1 and found[-1] == pytest.approx(0.1)


def test_without_a_schedule_it_is_the_cosine_of_earlier_releases():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 20)) for n in range(21)]
    assert rates()[4:] == pytest.approx(expected, rel=1e-15)


def test_linear_falls_by_the_same_amount_each_step():
    assert rates(schedule="linear")[4:] == pytest.approx([1 - 0.9 * n / 20 for n in range(21)])


@pytest.mark.parametrize(("share", "falls_in"), [(None, 3), (0.25, 6), (1e-9, 1)])
def test_wsd_stays_until_its_last_steps(share, falls_in):
    found = rates(schedule="wsd", decay_share=share)
    stays = 24 - falls_in
    assert set(found[4 : stays + 1]) == {1.0}
    falling = [1 - 0.9 * n / falls_in for n in range(falls_in + 1)]
    assert found[stays:] == pytest.approx(falling)


def test_wsd_whose_decay_meets_the_warm_up_falls_after_it():
    assert rates(schedule="wsd", decay_share=1.0) == rates(schedule="linear")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_run_shorter_than_the_warm_up_only_rises(schedule, steps):
    assert rates(steps, schedule=schedule)[:steps] == [0.25, 0.5, 0.75, 1.0][:steps]


def test_before_its_decay_wsd_does_not_depend_on_the_number_of_steps():
    assert rates(24, schedule="wsd")[:21] == rates(240, schedule="wsd")[:21]


def test_a_share_without_wsd_is_refused():
    with pytest.raises(ConfigError, match=r"decay_share is 0\.2, but schedule is linear"):
        rates(schedule="linear", decay_share=0.2)


def test_a_resumed_run_takes_the_rates_of_an_unbroken_one(config_file, tmp_path):
    def train(name: str, steps: int) -> list[float]:
        overrides = [f"run_dir={tmp_path / name}", f"train.steps={steps}"]
        overrides += ["optimizer.schedule=wsd", "optimizer.decay_share=0.4"]
        config = read_run_config(config_file, overrides)
        Trainer(config, Path(config.run_dir), Mesh()).run()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["lr"] for line in lines]

    whole = train("whole", 6)
    train("broken", 3)
    resumed = train("broken", 6)
    assert resumed[3:] == whole[3:] and len(resumed) == 6
    assert whole == [0.0015, 0.003, 0.003, 0.003, pytest.approx(0.0021), pytest.approx(0.0012)]
