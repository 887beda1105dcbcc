"""How near images are to the right ones. B images; images are ``[B, C, H, W]`` from -1 to 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = 2.0
"""From the lowest value of a pixel to the highest."""
WINDOW, STD = 11, 1.5
"""Sides of SSIM's window, and the standard deviation of its weights, in pixels."""


def psnr(images_BCHW: Tensor, right_BCHW: Tensor) -> Tensor:
    """Return each image's peak signal-to-noise ratio in dB, fp64 ``[B]``."""
    error_B = (images_BCHW.double() - right_BCHW.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(RANGE**2 / error_B)


def ssim(images_BCHW: Tensor, right_BCHW: Tensor) -> Tensor:
    """Return each image's structural similarity, fp64 ``[B]`` (Wang et al. 2004).

    With the window of the paper, where it fits into the image, and the mean over channels. Images
    have sides of 11 pixels or more.
    """
    one, two = images_BCHW.double(), right_BCHW.double()
    mean_1, mean_2 = _weighted(one), _weighted(two)
    variance_1 = _weighted(one * one) - mean_1**2
    variance_2 = _weighted(two * two) - mean_2**2
    covariance = _weighted(one * two) - mean_1 * mean_2
    low, high = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    brightness = (2 * mean_1 * mean_2 + low) / (mean_1**2 + mean_2**2 + low)
    structure = (2 * covariance + high) / (variance_1 + variance_2 + high)
    return (brightness * structure).flatten(1).mean(dim=1)


def _weighted(images_BCHW: Tensor) -> Tensor:
    """Return the weighted means in windows."""
    offsets_K = torch.arange(WINDOW, dtype=torch.float64, device=images_BCHW.device) - WINDOW // 2
    weights_K = torch.exp(-offsets_K.square() / (2 * STD**2))
    weights_K = weights_K / weights_K.sum()
    rows = images_BCHW.flatten(0, 1).unsqueeze(1)
    rows = F.conv2d(rows, weights_K.view(1, 1, 1, -1))
    return F.conv2d(rows, weights_K.view(1, 1, -1, 1)).view(*images_BCHW.shape[:2], -1)
