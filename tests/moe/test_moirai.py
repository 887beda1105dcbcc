"""Moirai: patches, the scaler, the loss, and forecasts that are drawn patch by patch."""

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.attention.rope import Rope, rotate
from moeyard.moe.config.kinds import read_model
from moeyard.moe.config.moirai import MoiraiConfig
from moeyard.moe.models import moirai
from moeyard.moe.models.futures import uniforms_of
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.options import ModelOptions
from moeyard.moe.models.patches import batch_after, batch_of_patches, cut, patch_ids, scale_of
from moeyard.moe.models.table import build_model

MOE = {"num_experts": 4, "d_expert": 12, "router": {"kind": "kmeans", "k": 2}}
SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "patch": 4}
LEVELS = (0.1, 0.5, 0.9)


def model_of(dtype=torch.float32, options=None, **changes):
    config = MoiraiConfig(**SIZES | {"moe": MOE, "num_samples": 20, "max_positions": 128} | changes)
    model = build_model(config) if options is None else build_model(config, options)
    initialize(model, 3)
    return model.to(dtype).eval()


def series(count=3, length=40, seed=0):
    steps = torch.randn(count, length, generator=torch.Generator().manual_seed(seed))
    values_BL = steps.cumsum(dim=1) + torch.arange(count).unsqueeze(1) * 10
    return values_BL, torch.ones(count, length, dtype=torch.bool)


def rows_of(scaled_NP):
    """Return the patches of one series as a batch."""
    return batch_of_patches(scaled_NP, patch_ids(scaled_NP), torch.tensor([len(scaled_NP)]))


@pytest.fixture(scope="module")
def model():
    return model_of()


def test_a_first_patch_is_filled_up_in_front():
    values_BL, observed_BL = series(2, 10)
    patches = cut(values_BL, observed_BL, 4)
    assert patches.values_BNP.shape == (2, 3, 4) and patches.first_B.tolist() == [0, 0]
    assert patches.observed_BNP[:, 0].tolist() == [[False, False, True, True]] * 2
    assert torch.equal(patches.values_BNP.flatten(1)[:, 2:], values_BL.double())


def test_mean_and_deviation_are_those_of_the_observed_points():
    values_BL, observed_BL = series(3, 12)
    observed_BL[1, 5:9] = False
    observed_BL[2] = False
    patches = cut(values_BL.masked_fill(~observed_BL, torch.nan), observed_BL, 4)
    loc_B, scale_B = scale_of(patches.values_BNP, patches.observed_BNP)
    for index in (0, 1):
        seen = values_BL[index][observed_BL[index]].double()
        torch.testing.assert_close(loc_B[index], seen.mean())
        torch.testing.assert_close(scale_B[index], seen.std())
    assert (float(loc_B[2]), float(scale_B[2])) == (0, 1)


def test_values_that_were_not_observed_change_nothing(model):
    values_BL, observed_BL = series()
    observed_BL[:, 13:19] = False
    observed_BL[1, 30:] = False
    other_BL = torch.where(observed_BL, values_BL, 1e6)
    one, two = (model.score(values, observed_BL) for values in (values_BL, other_BL))
    assert torch.equal(one.loss_sum, two.loss_sum)
    one, two = (model.predict(values, observed_BL, 6, LEVELS) for values in (values_BL, other_BL))
    assert torch.equal(one.quantiles_BHQ, two.quantiles_BHQ)


def test_points_that_were_not_observed_are_read_as_the_mean():
    values_BL, observed_BL = series(2, 20)
    observed_BL[:, 6:9] = False
    patches = cut(values_BL + 100, observed_BL, 4)
    scaled_BNP = patches.scaled(*scale_of(patches.values_BNP, patches.observed_BNP))
    assert (scaled_BNP.flatten(1)[:, 6:9] == 0).all()
    assert (scaled_BNP.flatten(1)[observed_BL] != 0).all()


def test_the_share_of_the_scaler_is_read_and_not_scored(model):
    values_BL, observed_BL = series(1, 40)  # 10 patches: 3 for the scaler
    loss = model.score(values_BL, observed_BL)
    assert loss.num_targets == 28 == model.num_targets(values_BL, observed_BL)
    patches = cut(values_BL, observed_BL, 4)
    scaled_NP = patches.scaled(
        values_BL[:, :12].double().mean(dim=1), values_BL[:, :12].double().std(dim=1)
    )[0]
    hidden_TD = model(rows_of(scaled_NP[:9])).hidden_TD
    density_TP = model.next_patch(hidden_TD).log_density(scaled_NP[1:].float())
    torch.testing.assert_close(loss.loss_sum, -density_TP[2:].sum(), rtol=1e-5, atol=1e-4)


def test_a_series_whose_scaler_does_not_vary_is_read_and_not_scored(model):
    values_BL, observed_BL = series(3, 40)
    values_BL[1, :12] = 0.1
    values_BL[2, 1:12], observed_BL[2, 1:12] = 7, False  # one point says nothing either
    found = model.score(values_BL, observed_BL)
    assert found.num_targets == 28 == model.num_targets(values_BL, observed_BL)
    torch.testing.assert_close(found.loss_sum, model.score(values_BL[:1], observed_BL[:1]).loss_sum)
    assert [int(routing.num_tokens) for routing in found.routings] == [3 * 9] * 2
    seen_BNP, _ = model.split_by_scaler(cut(values_BL, observed_BL, 4))
    assert seen_BNP.sum(dim=(1, 2)).tolist() == [12, 40, 29]  # scaled by all of their points
    values_BL[1, 11] = 0.2
    assert model.num_targets(values_BL, observed_BL) == 56


def test_patches_before_a_series_begins_do_not_count(model):
    values_BL, observed_BL = series(2, 40)
    observed_BL[0, :18] = False
    short = model.score(values_BL[:1, 18:], observed_BL[:1, 18:])
    whole = model.score(values_BL[1:], observed_BL[1:])
    both = model.score(values_BL, observed_BL)
    assert both.num_targets == short.num_targets + whole.num_targets
    assert model.num_targets(values_BL, observed_BL) == both.num_targets
    torch.testing.assert_close(both.loss_sum, short.loss_sum + whole.loss_sum)
    assert [int(routing.num_tokens) for routing in both.routings] == [5 + 9] * 2


def test_no_row_sees_a_later_patch(model):
    values_BL, observed_BL = series(1, 40)
    scaled_NP = cut(values_BL, observed_BL, 4).values_BNP[0]
    before_TD = model(rows_of(scaled_NP)).hidden_TD
    scaled_NP[6] += 1
    after_TD = model(rows_of(scaled_NP)).hidden_TD
    torch.testing.assert_close(after_TD[:6], before_TD[:6])
    assert ((after_TD - before_TD)[6:].abs().amax(dim=1) > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_with_a_cache_are_those_without(dtype):
    model = model_of(dtype)
    scaled_NP = cut(*series(1, 40), 4).values_BNP[0]
    whole_TD = model(rows_of(scaled_NP)).hidden_TD
    cache, found = model.new_cache(10), []
    for part in (slice(0, 6), slice(6, 7), slice(7, 10)):
        new_NP = scaled_NP[part]
        batch = batch_after([cache], new_NP, patch_ids(new_NP), [len(new_NP)])
        found.append(model(batch).hidden_TD)
    torch.testing.assert_close(torch.cat(found), whole_TD, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_drawn_patch_is_context_for_the_next_one(model):
    """The second patch of each future, drawn again without caches from the first one."""
    patches = cut(*series(2, 24), 4)
    scale = scale_of(patches.values_BNP, patches.observed_BNP)
    drawn_BSJP = model.futures(patches, *scale, 2, seed=5)
    assert drawn_BSJP.shape == (2, 20, 2, 4)
    for scaled_NP, values_NP, drawn_SJP in zip(
        patches.scaled(*scale), patches.values_BNP, drawn_BSJP, strict=True
    ):
        points_3SP = uniforms_of(5, [patch_ids(values_NP)], (2, 3, 20, 4))[0, 1]
        for index, first_P in enumerate(drawn_SJP[:, 0]):
            rows_NP = torch.cat([scaled_NP, first_P.unsqueeze(0)])
            hidden_TD = model(rows_of(rows_NP)).hidden_TD
            following = model.next_patch(hidden_TD[-1:])
            wanted_P = following.samples(points_3SP[:, index : index + 1])[0]
            torch.testing.assert_close(drawn_SJP[index, 1], wanted_P, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_futures_come_in_groups(model, monkeypatch):
    whole = model.predict(*series(), 10, LEVELS).quantiles_BHQ
    monkeypatch.setattr(moirai, "FUTURES_TOGETHER", 7)
    assert torch.equal(model.predict(*series(), 10, LEVELS).quantiles_BHQ, whole)


def test_forecasts_follow_the_seed_and_no_other_series(model):
    values_BL, observed_BL = series(3, 41)
    one = model.predict(values_BL, observed_BL, 10, LEVELS, seed=7)
    assert one.mean_BH.shape == (3, 10) and one.quantiles_BHQ.shape == (3, 10, 3)
    assert (one.quantiles_BHQ.diff(dim=2) > 0).all()
    alone = model.predict(values_BL[2:], observed_BL[2:], 10, LEVELS, seed=7)
    assert torch.equal(alone.quantiles_BHQ[0], one.quantiles_BHQ[2])
    assert torch.equal(alone.mean_BH[0], one.mean_BH[2])
    other = model.predict(values_BL, observed_BL, 10, LEVELS, seed=8)
    assert not torch.equal(other.mean_BH, one.mean_BH)
    shorter = model.predict(values_BL, observed_BL, 3, LEVELS, seed=7)
    assert torch.equal(shorter.mean_BH, one.mean_BH[:, :3])


def test_units_of_a_series_change_nothing():
    values_BL, observed_BL = series(2, 40)
    found = []
    for factor in (1.0, 2.0**-60, 2.0**60):  # exact, so the bits of the scaled series stay
        patches = cut(values_BL.double() * factor, observed_BL, 4)
        found.append(patches.scaled(*scale_of(patches.values_BNP, patches.observed_BNP)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_only_the_patches_that_leave_room_are_read(model):
    values_BL, observed_BL = series(1, 200)

    def mean(length):
        return model.predict(values_BL[:, -length:], observed_BL[:, -length:], 8).mean_BH

    whole = mean(200)  # 32 patches, two of them drawn
    assert torch.equal(whole, mean(120)) and not torch.equal(whole, mean(116))


@pytest.mark.parametrize("value", [0.0, 5.0, -1e9])
def test_a_constant_series_stays_where_it_is(model, value):
    values_BL, observed_BL = torch.full((1, 40), value), torch.ones(1, 40, dtype=torch.bool)
    assert model.score(values_BL, observed_BL).loss_sum.isfinite()
    found = model.predict(values_BL, observed_BL, 5, LEVELS).quantiles_BHQ
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=1e-2, atol=50)


def test_no_series_are_scored_with_gradients_of_zero(model):
    loss = model.train().score(torch.zeros(0, 40), torch.zeros(0, 40, dtype=torch.bool))
    model.eval()
    assert loss.num_targets == 0 and loss.loss_sum.item() == 0 and len(loss.routings) == 2
    loss.loss_sum.backward()
    assert model.predict(torch.zeros(0, 40), torch.zeros(0, 40) > 0, 5).mean_BH.shape == (0, 5)


def test_patches_have_different_numbers_and_equal_ones_the_same():
    values_NP = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    ids_N = patch_ids(values_NP)
    assert len(ids_N.unique()) == 500 and ids_N.min() >= 0 and ids_N.max() < 2**31
    assert torch.equal(patch_ids(values_NP[3:5]), ids_N[3:5])
    assert not torch.equal(patch_ids(values_NP.flip(1)), ids_N)


def test_recompute_changes_no_gradient():
    gradients = []
    for options in (None, ModelOptions(recompute=True)):
        model = model_of(options=options).train()
        model.score(*series()).loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@torch.no_grad()
def test_bf16_is_near_fp32(model):
    found, wanted = (m.score(*series()).loss_sum for m in (model_of(torch.bfloat16), model))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0)


def test_half_of_a_head_is_rotated():
    rope, half = Rope(8, 100.0, rotated=4), Rope(4, 100.0)
    positions_T = torch.arange(5)
    x_TQH = torch.randn(5, 2, 8)
    found = rotate(x_TQH, rope.tables(positions_T, torch.float32))
    turned, still = [0, 1, 4, 5], [2, 3, 6, 7]
    assert torch.equal(found[..., still], x_TQH[..., still])
    wanted = rotate(x_TQH[..., turned], half.tables(positions_T, torch.float32))
    torch.testing.assert_close(found[..., turned], wanted)


def test_a_model_rotates_half_of_its_heads(model):
    _, sines_T1H = model._rope.tables(torch.arange(1, 9), torch.float32)
    assert (sines_T1H == 0).all(dim=0).sum() == model.config.head_width // 2


@pytest.mark.parametrize(
    ("horizon", "levels", "message"),
    [
        (0, (), "horizon is 0; use a number from 1 to 124"),
        (125, (), "horizon is 125; use"),
        (5, (0.5, 1.0), "a quantile is 1.0; use numbers between"),
    ],
)
def test_forecasts_that_cannot_be_made_are_refused(model, horizon, levels, message):
    with pytest.raises(ConfigError, match=message):
        model.predict(*series(), horizon, levels)


def test_a_series_without_a_point_is_refused(model):
    values_BL, observed_BL = series()
    observed_BL[1] = False
    with pytest.raises(ConfigError, match="series 1 has no observed point to go on from"):
        model.predict(values_BL, observed_BL, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "d_model is 16, which does not split into 3 heads whose width is a"),
        ({"d_ff": None}, "d_ff is missing"),
        ({"max_positions": 7}, "max_positions is 7, which is less than two patches of 4 points"),
        (
            {"moe": MOE | {"router": {"kind": "topk", "lookahead": "previous_block"}}},
            "which models of series do not offer; use ffn_input",
        ),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_model(SIZES | {"kind": "moirai"} | changes)
