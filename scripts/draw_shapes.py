"""Draw images of shapes for three tasks that a model of kind vit can learn (docs/vision.md).

    .venv/bin/python scripts/draw_shapes.py shapes.npz [--images 4000] [--size 32] [--seed 0]

Each image has one or two shapes over a textured ground, the nearer one in front. Far things are
darker, so depth can be seen. The arrays are ``images`` (uint8 ``[N, H, W, 3]``), ``nearest`` (the
name of the shape in front of all), ``parts`` (uint8 ``[N, H, W]``: 0 for the ground, then the
shapes in the order of SHAPES) and ``depth`` (fp32 ``[N, H, W]``, 0 near to 1 far).
"""

import argparse
import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHAPES = ("disc", "square", "triangle", "cross", "ring")
NOISE = 0.06
FOG = 0.75
"""How much of its light the farthest thing loses."""

Array = npt.NDArray[Any]


def inside(shape: str, y: Array, x: Array) -> Array:
    """Return which points are in a shape around 0 that reaches to about 1."""
    radius = np.hypot(y, x)
    if shape == "disc":
        return radius < 0.9
    if shape == "square":
        return np.maximum(abs(y), abs(x)) < 0.8
    if shape == "triangle":
        return (y < 0.7) & (abs(x) < (y + 0.9) * 0.6)
    if shape == "cross":
        return (np.minimum(abs(y), abs(x)) < 0.3) & (np.maximum(abs(y), abs(x)) < 0.95)
    return (radius < 0.95) & (radius > 0.5)


def draw(random: np.random.Generator, size: int) -> tuple[Array, str, Array, Array]:
    """Return an image of floats, its nearest shape, its parts and its depth."""
    y, x = np.mgrid[0:size, 0:size] / size
    depth = 1 - 0.25 * y  # the ground comes nearer towards the bottom
    parts = np.zeros((size, size), dtype=np.uint8)
    waves = np.sin(2 * np.pi * (random.uniform(1, 4, 2) @ [y.ravel(), x.ravel()])).reshape(y.shape)
    ground = random.uniform(0.4, 0.8, 3)
    image = ground * (0.8 + 0.2 * waves[..., None])
    nearest = ""
    for far in sorted(random.uniform(0, 0.7, random.integers(1, 3)), reverse=True):
        number = int(random.integers(len(SHAPES)))
        middle, reach = random.uniform(0.2, 0.8, 2), random.uniform(0.22, 0.4)
        turn = random.uniform(0, 2 * np.pi)
        down, right = (y - middle[0]) / reach, (x - middle[1]) / reach
        turned = (
            down * np.cos(turn) - right * np.sin(turn),
            down * np.sin(turn) + right * np.cos(turn),
        )
        covered = inside(SHAPES[number], *turned)
        image[covered] = colorsys.hsv_to_rgb(random.uniform(), random.uniform(0.2, 0.9), 1.0)
        parts[covered], depth[covered] = number + 1, far
        nearest = SHAPES[number]
    image *= (1 - FOG * depth)[..., None]
    image += random.normal(0, NOISE, image.shape)
    return image.clip(0, 1), nearest, parts, depth


def draw_many(count: int, size: int, seed: int) -> dict[str, Array]:
    """Return the arrays of ``count`` images."""
    random = np.random.default_rng(seed)
    found = [draw(random, size) for _ in range(count)]
    images, nearest, parts, depth = zip(*found, strict=True)
    return {
        "images": (np.stack(images) * 255).round().astype(np.uint8),
        "nearest": np.array(nearest),
        "parts": np.stack(parts),
        "depth": np.stack(depth).astype(np.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="an .npz file")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    np.savez(arguments.file, **draw_many(arguments.images, arguments.size, arguments.seed))
    print(f"drew {arguments.images} images into {arguments.file}")


if __name__ == "__main__":
    main()
