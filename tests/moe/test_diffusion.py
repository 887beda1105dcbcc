"""The process, DDIM, sizes, tiles and measures of images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moeyard.moe.diffusion.ddim import ddim
from moeyard.moe.diffusion.frequency import FrequencyFilter, band_weights
from moeyard.moe.diffusion.images import (
    from_bytes,
    images_of,
    larger,
    patches_of,
    smaller,
    to_bytes,
)
from moeyard.moe.diffusion.measures import psnr, ssim
from moeyard.moe.diffusion.positions import grid_positions
from moeyard.moe.diffusion.schedule import Schedule
from moeyard.moe.diffusion.tiles import Tiles

import pictures


@pytest.fixture
def schedule() -> Schedule:
    return Schedule(1000, 0.0015, 0.0155)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_noise_grows_and_ends_as_the_whole(schedule):
    kept_N = schedule.kept_N
    assert kept_N[0] == pytest.approx(1 - 0.0015) and kept_N[-1] < 3e-4
    assert (kept_N[1:] < kept_N[:-1]).all()
    x, noise = pair(2, 3, 4, 4)
    mixed = schedule.add_noise(x, noise, torch.tensor([0, 999]))
    assert (mixed[0] - x[0]).abs().max() < 0.2 and (mixed[1] - noise[1]).abs().max() < 0.1


def test_what_the_layers_say_and_the_noise_are_one_thing(schedule):
    x, noise = pair(3, 1, 4, 4)
    times = torch.tensor([5, 400, 990])
    kept = schedule.kept_N[times].view(-1, 1, 1, 1)
    mixture = kept.sqrt() * noise - (1 - kept).sqrt() * x
    found = schedule.noise_of(mixture, schedule.add_noise(x, noise, times), times)
    torch.testing.assert_close(found, noise)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_of_a_perfect_denoiser_returns_the_image(schedule, steps, eta):
    image, start = pair(2, 3, 4, 4)

    def perfect(x, time, following):
        kept = schedule.kept(time)
        return (x - kept**0.5 * image) / (1 - kept) ** 0.5

    found = ddim(perfect, schedule, start, steps, eta, lambda place: pair(2, 3, 4, 4)[1])
    torch.testing.assert_close(found, image)


def test_ddim_names_the_next_timestep(schedule):
    calls = []

    def note(x, time, following):
        calls.append((time, following))
        return x

    ddim(note, schedule, torch.zeros(1, 1, 2, 2), 4)
    assert calls == [(999, 666), (666, 333), (333, 0), (0, None)]


def test_a_large_image_is_made_of_the_means_of_squares():
    images = torch.arange(16.0).view(1, 1, 4, 4) / 16
    assert torch.equal(smaller(images, 2)[0, 0] * 16, torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    shade = torch.full((2, 3, 4, 4), 0.25)
    torch.testing.assert_close(larger(shade, 4), torch.full((2, 3, 16, 16), 0.25))
    assert larger(torch.zeros(0, 3, 4, 4), 2).shape == (0, 3, 8, 8)


def test_bytes_and_patches_go_there_and_back():
    images = pictures.images(2, 8)
    assert np.array_equal(to_bytes(from_bytes(images)), images)
    values = from_bytes(images)
    patches_TP = patches_of(values, 2)
    assert torch.equal(images_of(patches_TP, 2, tuple(values.shape)), values)
    # Token 5 of the second image: row 1, column 1 of 4 x 4 patches.
    assert torch.equal(patches_TP[16 + 5].view(3, 2, 2), values[1, :, 2:4, 2:4])


def test_every_token_of_a_grid_has_its_own_position():
    positions_LD = grid_positions(3, 4, 8)
    assert positions_LD.shape == (12, 8) and len(positions_LD.unique(dim=0)) == 12
    assert torch.equal(positions_LD[5, :4], positions_LD[6, :4])  # one row
    assert torch.equal(positions_LD[2, 4:], positions_LD[6, 4:])  # one column


def test_bands_share_out_all_frequencies_and_one_gain_for_all_is_a_factor():
    weights_KHW = band_weights((8, 6), 4)
    torch.testing.assert_close(weights_KHW.sum(dim=0), torch.ones(8, 4, dtype=torch.float64))
    assert weights_KHW[0, 0, 0] == 1 and weights_KHW[-1, 4, 3] == pytest.approx(1)
    filter_ = FrequencyFilter(4, 3, 4).double()
    torch.nn.init.zeros_(filter_.gains.weight)
    torch.nn.init.zeros_(filter_.gains.bias)
    parts, time_BD = [*pair(2, 3, 8, 6), pair(2, 3, 8, 6)[0] ** 2], torch.zeros(2, 4).double()
    assert torch.equal(filter_(*parts, time_BD), parts[0])
    with torch.no_grad():
        gains_PCK = filter_.gains.bias.view(3, 3, 4)
        gains_PCK[1] = 0.5  # of the noisy image, in all bands
    torch.testing.assert_close(filter_(*parts, time_BD), parts[0] + 0.5 * parts[1])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (20, 33), (8, 15)])
def test_tiles_cover_images_and_join_to_what_they_were_cut_of(height, width):
    tiles = Tiles(height, width, 8)
    images = torch.randn(2, 3, height, width)
    cut = tiles.cut(images)
    assert cut.shape == (2 * len(tiles), 3, 8, 8)
    torch.testing.assert_close(tiles.join(cut, images), images)


def test_one_tile_keeps_its_bits():
    tiles, images = Tiles(8, 8, 8), torch.randn(3, 3, 8, 8)
    assert len(tiles) == 1 and torch.equal(tiles.join(tiles.cut(images), images), images)


def test_psnr_is_that_of_the_definition():
    right = torch.zeros(2, 3, 4, 4)
    near = torch.stack([right[0] + 0.02, right[1] + 0.2])  # of a range of 2: 1 % and 10 %
    torch.testing.assert_close(psnr(near, right), torch.tensor([40.0, 20.0]).double())


def test_ssim_is_the_mean_over_windows_of_the_paper():
    one, two = (t.clamp(-1, 1) for t in pair(1, 1, 13, 12))
    distances = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(distances[:, None] ** 2 + distances**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    values = []
    for up in range(3):
        for along in range(2):
            a, b = (t[0, 0, up : up + 11, along : along + 11] for t in (one, two))
            mean_a, mean_b = (a * weights).sum(), (b * weights).sum()
            var_a = ((a - mean_a) ** 2 * weights).sum()
            var_b = ((b - mean_b) ** 2 * weights).sum()
            both = ((a - mean_a) * (b - mean_b) * weights).sum()
            low, high = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            top = (2 * mean_a * mean_b + low) * (2 * both + high)
            values.append(top / ((mean_a**2 + mean_b**2 + low) * (var_a + var_b + high)))
    torch.testing.assert_close(ssim(one, two)[0], torch.stack(values).mean())
    assert float(ssim(one, one)[0]) == pytest.approx(1)
    assert ssim(F.pad(one, (1, 1)), F.pad(two, (1, 1))).shape == (1,)
