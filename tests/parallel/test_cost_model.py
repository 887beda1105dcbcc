"""Lines through measured times, and what keeps them true."""

import json
import random

import numpy as np
import pytest

from moeyard.errors import ConfigError
from moeyard.parallel.planning.comparison import Comparison, record_of
from moeyard.parallel.planning.cost_model import FREE, OPERATIONS, CostModel, Linear, fit

SIZES = [2.0**power for power in range(14, 22)]
ALPHA, BETA = 2e-4, 3e-9
"""About gloo's on the loopback."""


def samples(noise: float = 0.0, seed: int = 0, repeats: int = 5) -> list[tuple[float, float]]:
    random.seed(seed)
    exact = [(size, ALPHA + BETA * size) for size in SIZES for _ in range(repeats)]
    return [(size, seconds * random.lognormvariate(0, noise)) for size, seconds in exact]


def line_of(alpha: float, beta: float) -> Linear:
    return fit([(size, alpha + beta * size) for size in SIZES])


def model_of(**lines: Linear) -> CostModel:
    return CostModel(**{name: lines.get(name, FREE) for name in OPERATIONS})


def test_a_line_is_found_again():
    line = fit(samples())
    assert line.alpha == pytest.approx(ALPHA, rel=1e-9)
    assert line.beta == pytest.approx(BETA, rel=1e-9)
    assert line.r2 == pytest.approx(1) and line.outliers == 0


def test_the_fit_is_the_least_squares_of_relative_errors():
    noisy = samples(noise=0.02, repeats=1)
    line = fit(noisy)
    sizes, times = np.array(noisy).T
    columns = np.stack([1 / times, sizes / times], axis=1)
    best = np.linalg.lstsq(columns, np.ones(len(times)))[0]
    assert [line.alpha, line.beta] == pytest.approx(best.tolist(), rel=1e-6)
    predicted = line.alpha + line.beta * sizes
    variance = ((times - times.mean()) ** 2).sum()
    assert line.r2 == pytest.approx(1 - ((times - predicted) ** 2).sum() / variance)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_tenth_moves_no_prediction_by_a_fifth(seed):
    line = fit(samples(noise=0.1, seed=seed))
    for size in SIZES:
        assert line.seconds(size) == pytest.approx(ALPHA + BETA * size, rel=0.2)
    assert 0.9 < line.r2 < 1


def test_two_slow_repeats_of_every_size_change_nothing():
    exact = samples()
    slow = [(n, 10 * t if i % 5 < 2 else t) for i, (n, t) in enumerate(exact)]
    assert fit(slow) == fit(exact)


@pytest.mark.parametrize("wrong", [0, 3, 7])
def test_a_size_that_was_disturbed_is_left_out(wrong):
    disturbed = [(n, t * (4 if n == SIZES[wrong] else 1)) for n, t in samples()]
    line = fit(disturbed)
    assert (line.alpha, line.beta) == pytest.approx((ALPHA, BETA), rel=1e-6)
    assert line.outliers == 1


def test_no_line_predicts_negative_seconds():
    falling = fit([(size, 1.0 - size / 2**22) for size in SIZES])
    assert falling.beta == 0 and 0.5 < falling.alpha < 1
    below_zero = fit([(size, 1e-9 * (size - SIZES[0] / 2)) for size in SIZES])
    assert below_zero.alpha == 0 and below_zero.beta == pytest.approx(1e-9, rel=0.5)


def test_what_does_not_happen_takes_no_time():
    assert Linear(1.0, 2.0).seconds(0) == 0
    assert FREE.seconds(1e9) == 0


def test_a_model_survives_json():
    model = model_of(dispatch=fit(samples(noise=0.1)), experts=Linear(1e-4, 1e-6))
    assert CostModel.from_json(model.to_json()) == model


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"dispatch": {"alpha": 1}}'])
def test_text_that_is_no_model_is_refused_with_a_sentence(text):
    with pytest.raises(ConfigError, match="measure it again"):
        CostModel.from_json(text)


def test_operations_without_samples_are_free():
    model = CostModel.fitted({"dispatch": samples()})
    assert model.dispatch == fit(samples()) and model.gather == model.experts == FREE


def test_a_record_has_r2_and_the_error_of_each_phase():
    comparison = Comparison()
    comparison.add("forward", 0.2, 0.25)
    comparison.add("forward", 0.2, 0.15)
    comparison.add("backward", 0.6, 0.4)
    model = model_of(dispatch=line_of(ALPHA, BETA))
    record = json.loads(json.dumps(record_of(model, comparison)))
    assert record["r2"] == {"dispatch": pytest.approx(1)}
    assert record["phases"]["forward"] == pytest.approx(
        {"predicted_s": 0.2, "measured_s": 0.2, "relative_error": 0}
    )
    assert record["phases"]["backward"]["relative_error"] == pytest.approx(0.5)
    assert comparison.take() == {}
