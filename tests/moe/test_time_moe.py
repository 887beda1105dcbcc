"""Time-MoE reads series point by point; its loss, its masks, its forecasts with a cache."""

import pytest
import torch
import torch.nn.functional as F

from moeyard.errors import ConfigError
from moeyard.moe.config.time_moe import TimeMoeConfig
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.options import ModelOptions
from moeyard.moe.models.series_batch import batch_of_series
from moeyard.moe.models.table import build_model

from small_series import TIME_MOE

HORIZONS = (1, 4)


@pytest.fixture
def model():
    found = build_model(TimeMoeConfig(**TIME_MOE)).eval()
    initialize(found, 1)
    for head in found.lm_heads:
        head.out_layer.weight.data *= 20  # forecasts as large as the series
    return found


def series(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / 2


def seen(values):
    return torch.ones_like(values, dtype=torch.bool)


def huber(found, wanted, delta=2.0):
    error = abs(float(found) - float(wanted))
    return 0.5 * error**2 if error <= delta else delta * (error - 0.5 * delta)


@torch.no_grad()
def by_hand(model, values_L, observed_L):
    """Return a window's loss, point by point."""
    last, row_of, rows = 0.0, {}, []
    for place, value in enumerate(values_L[:-1].tolist()):
        last = value if observed_L[place] else last
        if observed_L[: place + 1].any():
            row_of[place] = len(rows)
            rows.append(last)
    one = torch.tensor([rows])
    hidden_TD = model(batch_of_series(one, seen(one))).hidden_TD
    means = []
    for horizon, head in zip(HORIZONS, model.lm_heads, strict=True):
        points_TH = head(hidden_TD)
        found = [
            huber(points_TH[row, ahead], values_L[place + 1 + ahead])
            for place, row in row_of.items()
            for ahead in range(horizon)
            if place + 1 + ahead < len(values_L) and observed_L[place + 1 + ahead]
        ]
        means.append(sum(found) / len(found))
    return sum(means) / len(means)


@torch.no_grad()
def test_the_loss_is_the_mean_over_heads_of_every_row_s_huber_losses(model):
    values_BL = series(3, 14)
    observed_BL = seen(values_BL)
    observed_BL[1, [0, 1, 6, 7, 13]] = False
    scored = model.score(values_BL, observed_BL)
    each = [by_hand(model, *window) for window in zip(values_BL, observed_BL, strict=True)]
    assert max(each) > 2  # beyond delta, so both forms of the loss take part
    assert scored.num_targets == model.num_targets(values_BL, observed_BL) == 3
    assert float(scored.loss_sum) == pytest.approx(sum(each), rel=1e-5)


def test_values_that_were_not_observed_change_nothing(model):
    values_BL, observed_BL = series(2, 16), seen(series(2, 16))
    observed_BL[0, :3] = observed_BL[1, 7:9] = observed_BL[:, -1] = False
    other_BL = torch.where(observed_BL, values_BL, 99.0)
    found = [model.score(x, observed_BL).loss_sum for x in (values_BL, other_BL)]
    assert torch.equal(*found)
    ahead = [model.predict(x, observed_BL, 9).mean_BH for x in (values_BL, other_BL)]
    assert torch.equal(*ahead)


@torch.no_grad()
def test_points_before_the_first_observed_one_are_as_if_not_there(model):
    short_BL = series(1, 9)
    long_BL = F.pad(short_BL, (5, 0), value=7.0)
    observed_BL = F.pad(seen(short_BL), (5, 0))
    pairs = [(short_BL, seen(short_BL)), (long_BL, observed_BL)]
    losses = [float(model.score(*pair).loss_sum) for pair in pairs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ahead = [model.predict(*pair, 7).mean_BH for pair in pairs]
    torch.testing.assert_close(*ahead)


@torch.no_grad()
def test_windows_without_a_target_and_empty_batches_have_no_loss(model):
    values_BL, observed_BL = series(3, 8), seen(series(3, 8))
    observed_BL[0] = False
    observed_BL[1, 1:] = False
    whole = model.score(values_BL, observed_BL)
    assert whole.num_targets == 1
    alone = model.score(values_BL[2:], observed_BL[2:])
    assert float(whole.loss_sum) == pytest.approx(float(alone.loss_sum), rel=1e-6)
    empty = model.score(values_BL[:0], observed_BL[:0])
    assert empty.num_targets == 0 and float(empty.loss_sum) == 0 and len(empty.routings) == 2
    assert model.predict(values_BL[:0], observed_BL[:0], 6).mean_BH.shape == (0, 6)


@torch.no_grad()
@pytest.mark.parametrize(("horizon", "heads"), [(1, [1]), (3, [1, 1, 1]), (4, [4]), (9, [4, 4, 1])])
def test_forecasts_with_a_cache_are_those_of_whole_contexts(model, horizon, heads):
    """The largest head that fits predicts, and its points become the next context."""
    values_BL = series(3, 12)
    context_BL = values_BL
    for points in heads:
        rows_TD = model(batch_of_series(context_BL, seen(context_BL))).hidden_TD
        last_BD = rows_TD.unflatten(0, (3, -1))[:, -1]
        head = model.lm_heads[HORIZONS.index(points)]
        context_BL = torch.cat([context_BL, head(last_BD)], dim=1)
    found = model.predict(values_BL, seen(values_BL), horizon, quantiles=(0.5,), seed=9)
    assert found.quantiles_BHQ is None
    torch.testing.assert_close(found.mean_BH, context_BL[:, 12:], rtol=1e-4, atol=1e-4)
    alone = model.predict(values_BL[1:2], seen(values_BL[1:2]), horizon).mean_BH
    torch.testing.assert_close(found.mean_BH[1:2], alone, rtol=1e-4, atol=1e-4)


def test_the_smallest_head_is_cut_where_none_fits():
    model = build_model(TimeMoeConfig(**TIME_MOE | {"horizons": [4, 8]})).eval()
    values_BL = series(2, 10)
    three, four = (model.predict(values_BL, seen(values_BL), n).mean_BH for n in (3, 4))
    assert torch.equal(three, four[:, :3])


def test_recompute_changes_no_gradient(model):
    again = build_model(model.config, ModelOptions(recompute=True))
    again.load_state_dict(model.state_dict())
    values_BL = series(2, 11)
    for one in (model, again):
        one.train().score(values_BL, seen(values_BL)).loss_sum.backward()
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert first.grad.abs().max() > 0 or ".experts." in name, name
        assert torch.equal(first.grad, second.grad), name


def test_dense_layers_have_no_experts():
    config = TimeMoeConfig(**TIME_MOE | {"moe": None})
    scored = build_model(config).score(series(1, 6), seen(series(1, 6)))
    assert scored.routings == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "d_model is 16, which does not split into 3 heads of even width"),
        ({"num_kv_heads": 3}, "num_heads is 2, which num_kv_heads = 3 does not divide"),
        ({"horizons": [4, 1]}, r"horizons is \[4, 1\]; give whole numbers that rise"),
        ({"horizons": []}, "at least 1 item"),
        ({"d_ff": None, "moe": None}, "d_ff is missing"),
        ({"moe": TIME_MOE["moe"] | {"router": {"kind": "hash"}}}, "chooses at token, which models"),
        (
            {"moe": TIME_MOE["moe"] | {"router": {"kind": "expert_choice", "evaluation": "group"}}},
            "moe.router.evaluation is group, which chooses among all tokens of a sequence",
        ),
        (
            {"moe": TIME_MOE["moe"] | {"router": {"kind": "topk", "lookahead": "previous_block"}}},
            "chooses at previous_block, which models of series do not offer",
        ),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TimeMoeConfig(**TIME_MOE | changes)


@pytest.mark.parametrize(
    ("length", "horizon", "message"),
    [
        (60, 5, "has 60 points and horizon is 5, but the model takes 1 or more of each and 64"),
        (10, 0, "horizon is 0"),
        (0, 3, "has 0 points"),
    ],
)
def test_horizons_that_the_model_does_not_reach_are_refused(model, length, horizon, message):
    values_BL = series(1, 64)[:, :length]
    with pytest.raises(ConfigError, match=message):
        model.predict(values_BL, seen(values_BL), horizon)


def test_a_series_without_any_point_cannot_be_forecast(model):
    observed_BL = seen(series(3, 5))
    observed_BL[1] = False
    with pytest.raises(ConfigError, match="series 1 has no observed point; give at least one"):
        model.predict(series(3, 5), observed_BL, 2)
