"""The forecaster: contexts, batches, quantiles, and what cannot be continued."""

import numpy as np
import pytest
from seasonal import LONGEST, Seasonal

from moeyard.errors import ConfigError
from moeyard.moe.models.forecaster import Forecaster, TrainedOn
from moeyard.moe.models.series_values import Scale

UP = [1.0, 2.0, 3.0, 5.0] * 3


def test_forecasts_are_in_the_order_and_the_units_of_their_series():
    model = Seasonal()
    series = [UP, np.array(UP[:8]) * 1e6, [*UP, 7]]
    found = Forecaster(model)(series, 6, [0.5, 0.9])
    np.testing.assert_allclose(found[0].mean, [1, 2, 3, 5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(found[1].mean, np.array([1, 2, 3, 5, 1, 2]) * 1e6, rtol=1e-6)
    np.testing.assert_allclose(found[2].mean, [2, 3, 5, 7, 2, 3], rtol=1e-6)
    assert list(found[0].quantiles) == [0.5, 0.9]
    np.testing.assert_array_equal(found[0].quantiles[0.5], found[0].mean)
    spread = np.std(UP, ddof=1) * 0.4
    np.testing.assert_allclose(found[0].quantiles[0.9], found[0].mean + spread, rtol=1e-6)


def test_series_of_one_length_are_read_together_up_to_the_batch():
    model = Seasonal()
    series = [np.arange(8.0) + n for n in range(5)] + [np.arange(9.0)]
    found = Forecaster(model)(series, 2, batch_series=3, seed=7)
    assert model.batches == [(3, 8, 2, 7), (2, 8, 2, 7), (1, 9, 2, 7)]
    np.testing.assert_allclose([one.mean[0] for one in found], [4, 5, 6, 7, 8, 5], rtol=1e-6)


def test_one_series_needs_no_list_around_it():
    model = Seasonal()
    for series in (UP, np.array(UP), np.array([UP]), tuple(UP), np.array(UP, dtype=np.float32)):
        (found,) = Forecaster(model)(series, 1)
        np.testing.assert_allclose(found.mean, [1], rtol=1e-6)
        assert found.mean.dtype == np.float64


def test_the_last_points_are_read_and_the_first_observed_one_is_the_first():
    model = Seasonal()
    long = np.arange(100.0)
    Forecaster(model)(long, 1)
    Forecaster(model)(long, 1, context=10)
    Forecaster(model)([np.nan, None, 1.0, 2.0, np.nan, 3.0], 1)
    assert [batch[1] for batch in model.batches] == [LONGEST - 1, 10, 4]


def test_points_that_were_not_observed_are_told_to_the_model_and_are_finite():
    seen = []

    class Watching(Seasonal):
        def predict(self, values_BL, observed_BL, *rest):
            seen.append((values_BL.tolist(), observed_BL.tolist()))
            return super().predict(values_BL, observed_BL, *rest)

    Forecaster(Watching())([[1.0, np.nan, 3.0, 4.0, None], [5, 6, 7, 8, 9]], 1)
    values, observed = seen[0]
    known = np.array([1, 3, 4])
    scaled = (np.array([1, 1, 3, 4, 4]) - known.mean()) / known.std()
    np.testing.assert_allclose(values[0], scaled, rtol=1e-6)
    assert observed[0] == [True, False, True, True, False]
    assert all(observed[1])


def test_a_constant_series_goes_on_without_the_model():
    model = Seasonal()
    found = Forecaster(model)([[0.1, np.nan, 0.1], [1, 2, 3]], 2, [0.25, 0.5])
    assert found[0].mean.tolist() == [0.1, 0.1]
    assert {q: list(v) for q, v in found[0].quantiles.items()} == {0.25: [0.1] * 2, 0.5: [0.1] * 2}
    assert [batch[0] for batch in model.batches] == [1]
    assert Forecaster(Seasonal(quantiles=False))([3, 3], 1)[0].quantiles is None


def test_quantiles_are_the_usual_ones_or_none_for_a_model_of_points():
    (found,) = Forecaster(Seasonal())(UP, 1)
    assert list(found.quantiles) == [0.1, 0.5, 0.9]
    points = Forecaster(Seasonal(quantiles=False))
    assert points(UP, 1)[0].quantiles is None
    with pytest.raises(ConfigError, match="the model forecasts points and has none; leave it out"):
        points(UP, 1, [0.5])


REFUSED = {
    "horizon": ({"horizon": 0}, "horizon is 0; use a number from 1"),
    "below": ({"horizon": -3}, "horizon is -3"),
    "far": ({"horizon": 10**9}, "horizon is 1000000000"),
    "context": ({"context": 63}, "context is 63; use a number from 2 to 62"),
    "one": ({"context": 1}, "context is 1"),
    "quantile": ({"quantiles": [0.5, 1]}, "quantiles has 1; use numbers between 0 and 1"),
    "twice": ({"quantiles": [0.5, 0.5]}, "give each one once"),
    "seed": ({"seed": -1}, "seed is -1"),
    "batch": ({"batch_series": 0}, "batch_series is 0"),
    "empty": ({"series": []}, "series is empty"),
    "none_in_it": ({"series": [UP, []]}, "series 1 has 0 observed points"),
    "short": ({"series": [1.0]}, "series 0 has 1 observed point among the last 1, but a forecast"),
    "unobserved": ({"series": [np.nan] * 5}, "series 0 has 0 observed points among the last 5"),
    "gaps": ({"series": [1, *[None] * 4, 2, 3]}, "series 0 lacks 4 of the 7 points"),
    "text": ({"series": [[1, "hot", 2]]}, "series 0 has 'hot', which is not a number"),
    "flags": ({"series": [True, False]}, "series 0 has True, which is not a number"),
    "words": ({"series": "1 2 3"}, "series is '1 2 3'; give lists"),
    "number": ({"series": 3}, "series is 3; give lists"),
    "infinite": ({"series": [1, 2, np.inf]}, "series 0 is infinite at point 2"),
    "huge": ({"series": [1, 2, 1e101]}, "series 0 has values beyond 1e.100"),
    "tiny": ({"series": [1e-200, 2e-200, 1e-200, 3e-200]}, "its standard deviation rounds to 0"),
    "columns": ({"columns": ["a", "b"]}, "columns has 2 names, but there are 1 series"),
    "integer": ({"series": [1, 10**400]}, "series 0 is not a list of numbers"),
    "deep": ({"series": np.zeros((2, 2, 2))}, "series 0 has 2 dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_continued_is_refused_in_one_sentence(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        Forecaster(Seasonal())(**{"series": UP, "horizon": 2, **changes})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_context_and_horizon_share_the_points_of_the_model():
    with pytest.raises(ConfigError, match="horizon is 63, but the model takes 64 points"):
        Forecaster(Seasonal())(UP, 63)
    assert len(Forecaster(Seasonal())(UP, 62)[0].mean) == 62


def test_a_model_reads_what_its_training_read():
    model = Seasonal(quantiles=False)
    trained_on = TrainedOn(8, {"a": Scale(100.0, 10.0)})
    forecaster = Forecaster(model, trained_on)
    seen = []
    model.register_forward_pre_hook(lambda _, rows: seen.append(rows[0][:, 0].tolist()))
    (found,) = forecaster(UP, 3, columns=["a"])
    np.testing.assert_allclose(seen.pop(), (np.array(UP[-8:]) - 100) / 10, rtol=1e-6)
    np.testing.assert_allclose(found.mean, [1, 2, 3], rtol=1e-5)
    forecaster(UP, 3, columns=["b"])
    np.testing.assert_allclose(np.mean(seen.pop()), 0, atol=1e-6)
    forecaster(UP, 60, columns=["a"])  # the horizon leaves less than training read
    forecaster(UP, 3, context=12)
    assert [batch[1] for batch in model.batches] == [8, 8, 4, 12]


def test_a_value_beyond_fp32_at_the_scale_of_training_is_refused():
    forecaster = Forecaster(Seasonal(), TrainedOn(8, {"x": Scale(0.0, 1.0)}))
    with pytest.raises(
        ConfigError, match=r"series 0 has 1e\+60, which is beyond fp32 less the mea"
    ):
        forecaster([1, 2, 1e60], 1, columns=["x"])
    assert len(forecaster([1, 2, 1e60], 1)) == 1  # at its own scale
    assert forecaster([1e60, 1e60], 1, columns=["x"])[0].mean.tolist() == [1e60]


def test_a_forecast_that_is_not_finite_is_refused():
    class Overflowing(Seasonal):
        def predict(self, values_BL, *rest):
            found = super().predict(values_BL, *rest)
            return found._replace(
                quantiles_BHQ=found.quantiles_BHQ / (found.mean_BH != 0)[..., None]
            )

    forecaster = Forecaster(Overflowing())
    assert len(forecaster([[1, 2, 4], [5, 6, 8]], 1)) == 2
    with pytest.raises(ConfigError, match="series 1 has a forecast that is not finite"):
        forecaster([[1, 2, 4], [5, 6, 7, 6]], 3, [0.1])


def test_quantiles_have_the_shortest_names_that_tell_them_apart():
    asked = [0.1, 0.1234567, 0.1234568, 1e-7]
    (found,) = Forecaster(Seasonal())(UP, 1, asked)
    assert list(found.named_quantiles) == ["0.1", "0.1234567", "0.1234568", "1e-07"]
    assert Forecaster(Seasonal(quantiles=False))(UP, 1)[0].named_quantiles is None


def test_large_offsets_and_scales_lose_nothing_to_fp32():
    series = 1e9 + np.array(UP)
    np.testing.assert_allclose(Forecaster(Seasonal())(series, 4)[0].mean, series[:4], rtol=1e-15)
    tiny = np.array(UP) * 1e-40
    np.testing.assert_allclose(Forecaster(Seasonal())(tiny, 4)[0].mean, tiny[:4], rtol=1e-5)


def test_it_shows_what_it_is():
    text = repr(Forecaster(Seasonal()))
    assert text.startswith("Forecaster(") and "5 a layer of width 3" in text
