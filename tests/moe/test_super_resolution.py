"""The super-resolution model: what it reads, its experts, its configurations, and enlarging."""

import dataclasses

import numpy as np
import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.config.kinds import read_model
from moeyard.moe.config.super_resolution import SuperResolutionConfig
from moeyard.moe.experts.resident import Experts
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.options import ModelOptions
from moeyard.moe.models.super_resolution import SuperResolution
from moeyard.moe.models.upscaler import Upscaler
from moeyard.moe.routers.timestep import TimestepRouter

import pictures

LATE = {"kind": "topk", "lookahead": "previous_block"}
CONFIG = SuperResolutionConfig(**pictures.MODEL | {"residual_std": 0.1})


def noisy(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = (torch.randn(count, 3, 8, 8, generator=generator) for _ in range(2))
    return *images, torch.tensor([10, 999, 400, 260])[:count]


def test_a_new_model_says_that_nothing_is_missing_from_the_enlarged_image():
    model = SuperResolution(CONFIG)
    initialize(model, 0)
    x, guide, times = noisy()
    noise = model.eval().denoise(x, guide, times).noise_BCHW
    kept = model.schedule.kept_N[times].view(-1, 1, 1, 1)
    torch.testing.assert_close(noise, ((1 - kept).sqrt() * x).float())


def test_an_image_does_not_depend_on_the_others():
    model, (x, guide, times) = pictures.model().eval(), noisy()
    together = model.denoise(x, guide, times).noise_BCHW
    for one in range(3):
        some = slice(one, one + 1)
        alone = model.denoise(x[some], guide[some], times[some]).noise_BCHW
        torch.testing.assert_close(alone, together[some], atol=1e-5, rtol=1e-5)
    assert model.denoise(x[:0], guide[:0], times[:0]).noise_BCHW.shape == (0, 3, 8, 8)


def test_layers_have_the_experts_that_the_configuration_says():
    model, (x, guide, times) = pictures.model().train(), noisy()
    found = model.denoise(x, guide, times, draw_keys=(1, 2, 3))
    by_time, at_random = (routing.counts_E.tolist() for routing in found.routings)
    assert by_time == [16, 16, 0, 16] and at_random == [12, 12, 12, 12]
    same = model.denoise(x[1:], guide[1:], times[1:], draw_keys=(2, 3))
    assert torch.equal(same.routings[1].experts_TK, found.routings[1].experts_TK[16:])


def test_every_part_reads_what_it_should():
    model, (x, guide, times) = pictures.model().eval(), noisy()
    noise = model.denoise(x, guide, times).noise_BCHW
    other = model.denoise(x, guide, times - 1).noise_BCHW  # the time, also inside an interval
    assert (other - noise).abs().flatten(1).amax(1).min() > 1e-4
    guide[0, 0, 0, 0] += 1
    change = (model.denoise(x, guide, times).noise_BCHW - noise).abs()
    assert change[0, :, 6:, 6:].max() > 1e-4 and change[1:].max() == 0  # attention is everywhere


def test_recomputing_changes_nothing():
    x, guide, times = noisy()
    gradients = []
    for recompute in (False, True, "experts"):
        model = SuperResolution(CONFIG, ModelOptions(recompute=recompute)).train()
        model.load_state_dict(pictures.model().state_dict())
        model.denoise(x, guide, times, (1, 2, 3)).noise_BCHW.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("experts" in name for name in gradients[0])
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, msg=name)


def test_the_next_steps_experts_are_announced_when_this_step_no_longer_needs_its_own():
    model, (x, guide, _) = pictures.model().eval(), noisy(2)
    events = []

    class Noting(Experts):
        def announce(self, routing):
            events.append(("announce", routing.experts_TK.unique().tolist()))

        def forward(self, *arguments):
            events.append(("run", arguments[1].unique().tolist()))
            return super().forward(*arguments)

    layer = model.layers[0].mlp
    layer.experts.__class__ = Noting
    times = torch.tensor([700, 700])
    model.denoise(x, guide, times, next_times_B=times - 250)
    assert events == [("announce", [2]), ("run", [2]), ("announce", [1])]


def test_folders_and_sections_keep_the_configuration():
    values = to_hf(CONFIG, "float32")
    assert values["model_type"] == "moeyard" and from_hf(values) == CONFIG
    assert read_model(CONFIG.model_dump(mode="json")) == CONFIG
    plain = CONFIG.model_copy(update={"space_layers": ()})
    assert plain.architecture()["space"] is None
    other = CONFIG.model_copy(update={"space": CONFIG.space.model_copy(update={"exchange": 0.1})})
    assert other.architecture() == CONFIG.architecture()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 18}, "d_model is 18; use a multiple of num_heads = 2 and of 4"),
        ({"image_size": 9}, "image_size is 9, which patch = 2 does not divide; use a multiple"),
        ({"image_size": 10, "scale": 4}, "image_size is 10, which scale = 4 does not divide"),
        ({"beta_start": 0.5}, "beta_end is 0.0155, less than beta_start = 0.5"),
        ({"space_layers": [1]}, "space_layers names layer 1, which dense_layers names too"),
        ({"space_layers": [7]}, "space_layers names layer 7, but there are 3"),
        ({"moe": None}, "space_layers has layers, but moe is missing"),
        ({"d_ff": None}, "d_ff is missing"),
        ({"timesteps": 50}, "moe.router.num_timesteps is 1000, but timesteps is 50"),
        (
            {"moe": pictures.MODEL["moe"] | {"block": {"kind": "momentum"}}},
            "moe.block.kind is momentum, but layers of super-resolution models join by a gate",
        ),
        (
            {"moe": {"num_experts": 4, "d_expert": 8, "router": LATE}},
            "previous_block, which super-resolution models do not offer; use ffn_input",
        ),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SuperResolutionConfig(**pictures.MODEL | changes)


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler(pictures.model())


def test_an_image_comes_out_the_same_in_any_company(upscaler):
    images = pictures.images(3, 5)
    large = upscaler(images, steps=3)
    assert large.shape == (3, 10, 10, 3) and large.dtype == np.uint8
    assert np.array_equal(upscaler(images[1], steps=3), large[1])
    assert not np.array_equal(upscaler(images[1], steps=3, seed=1), large[1])
    drawn = [upscaler(images[1], steps=3, eta=1.0) for _ in range(2)]
    assert np.array_equal(*drawn) and not np.array_equal(drawn[0], large[1])
    assert upscaler(images[:, :2, :3], steps=1).shape == (3, 4, 6, 3)  # less than a tile


def test_a_model_that_knows_the_image_gives_it_back(upscaler, monkeypatch):
    right = torch.from_numpy(pictures.images(1, 14)).permute(0, 3, 1, 2).float() / 127.5 - 1
    guide = torch.zeros(1, 3, 14, 14)
    model = upscaler.model
    from moeyard.moe.diffusion.tiles import Tiles

    residual = Tiles(14, 14, 8).cut(model.residual(right, guide))

    def perfect(noisy, guide, times, keys, later):
        kept = model.schedule.kept_N[times].view(-1, 1, 1, 1)
        noise = (noisy - kept.sqrt() * residual) / (1 - kept).sqrt()
        return dataclasses.make_dataclass("Found", ["noise_BCHW"])(noise)

    monkeypatch.setattr(model, "denoise", perfect)
    torch.testing.assert_close(upscaler.enlarge(guide, steps=5), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("images", "fields", "message"),
    [
        (np.zeros((4, 4, 3)), {}, "images are of type float64; give a numpy array of bytes"),
        ("x.png", {}, "images are of type str; give a numpy array"),
        (np.zeros((4, 4), np.uint8), {}, r"images have shape \[4, 4\]; give \[images, rows, col"),
        (np.zeros((4, 4, 1), np.uint8), {}, r"shape \[4, 4, 1\]"),
        (None, {"steps": 0}, "steps is 0; use a number from 1 to 1000, the model's timesteps"),
        (None, {"steps": 1001}, "steps is 1001"),
        (None, {"eta": 1.5}, "eta is 1.5; use a number from 0 to 1"),
        (None, {"batch_tiles": 0}, "batch_tiles is 0; use a number from 1 upwards"),
    ],
)
def test_bad_calls_get_one_sentence(upscaler, images, fields, message):
    images = pictures.images(1, 4) if images is None else images
    with pytest.raises(ConfigError, match=message):
        upscaler(images, **fields)


def test_it_says_what_it_is(upscaler):
    text = repr(upscaler)
    assert "enlarges 2 times, in tiles of 8 pixels" in text and "4 a layer of width 12" in text
    assert isinstance(upscaler.model.routers()[0], TimestepRouter)
