"""Small images and models that enlarge them, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeyard.moe.config.super_resolution import SuperResolutionConfig
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.super_resolution import SuperResolution

MODEL: dict[str, Any] = {
    "kind": "super_resolution",
    "d_model": 16,
    "num_layers": 3,
    "num_heads": 2,
    "d_ff": 12,
    "image_size": 8,
    "scale": 2,
    "patch": 2,
    "frequency_bands": 3,
    "moe": {"num_experts": 4, "d_expert": 12, "router": {"kind": "timestep"}},
    "dense_layers": [1],
    "space_layers": [2],
    "space": {"exchange": 0.5, "exchange_steps": 2},
}
"""A layer with experts of times, a dense one, and one with sampling-space experts."""


def images(count: int = 24, side: int = 12, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return smooth shades with some noise, bytes ``[N, H, W, C]``."""
    random = np.random.Generator(np.random.PCG64(seed))
    ramp = np.linspace(0, 1, side)
    slopes = random.uniform(-1, 1, (2, count, 1, 1, channels))
    shades = slopes[0] * ramp[:, None, None] + slopes[1] * ramp[None, :, None] + 1
    shades = shades + 0.1 * random.standard_normal(shades.shape)
    return (shades / 3 * 255).clip(0, 255).astype(np.uint8)


def write(path: Path, array: np.ndarray | None = None) -> Path:
    """Write images into a ``.npz`` file."""
    np.savez(path, images=images() if array is None else array)
    return path


def model(seed: int = 0, **changes: Any) -> SuperResolution:
    """Return a model whose layers that begin at zero do not."""
    config = SuperResolutionConfig(**{**MODEL, "residual_std": 0.1, **changes})
    found = SuperResolution(config)
    initialize(found, seed)
    torch.manual_seed(seed)
    for name, parameter in found.named_parameters():
        if name.endswith(("modulation.weight", "patches_out.weight", "gains.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return found
