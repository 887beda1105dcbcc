"""Draw images of textures and shapes, for trials of models that read images.

    python scripts/draw_images.py images.npz [--count 600] [--side 48] [--seed 0]

Each image has a background (a shade, waves or a checked pattern) and some discs, bars and triangles
in front, each in a colour or in waves of its own. Edges are soft by a pixel. The same arguments
draw the same images. The file has one array, ``images``: bytes ``[N, side, side, 3]``.
"""

import argparse
from pathlib import Path

import numpy as np

FINER = 2
"""Images are drawn so many times larger and then averaged."""


def draw(count: int, side: int, seed: int) -> np.ndarray:
    """Return bytes ``[count, side, side, 3]``."""
    random = np.random.Generator(np.random.PCG64(seed))
    return np.stack([_image(random, side) for _ in range(count)])


def _image(random: np.random.Generator, side: int) -> np.ndarray:
    size = side * FINER
    down, along = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
    picture = _texture(random, down, along)
    for _ in range(random.integers(2, 6)):
        inside = _shape(random, down, along)
        picture = np.where(inside[..., None], _texture(random, down, along), picture)
    picture = picture.reshape(side, FINER, side, FINER, 3).mean(axis=(1, 3))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _texture(random: np.random.Generator, down: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Return a colour, a shade between two, waves or checks of two colours, ``[H, W, 3]``."""
    one, other = random.random(3), random.random(3)
    angle, kind = random.uniform(0, np.pi), random.integers(4)
    place = down * np.sin(angle) + along * np.cos(angle)
    across = along * np.sin(angle) - down * np.cos(angle)
    waves = random.uniform(2, 12)
    share = np.zeros_like(down)
    if kind == 1:
        share = (place - place.min()) / np.ptp(place)
    if kind == 2:
        share = 0.5 + 0.5 * np.sin(2 * np.pi * waves * place + random.uniform(0, 6))
    if kind == 3:
        share = (np.floor(place * waves) + np.floor(across * waves)) % 2
    return one + share[..., None] * (other - one)


def _shape(random: np.random.Generator, down: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Return which points are inside a disc, a bar or a triangle, ``[H, W]``."""
    centre, size = random.random(2), random.uniform(0.05, 0.3)
    kind, angle = random.integers(3), random.uniform(0, 2 * np.pi)
    y, x = down - centre[0], along - centre[1]
    if kind == 0:
        return y**2 + x**2 < size**2
    if kind == 1:
        length, width = size * 2, random.uniform(0.01, 0.06)
        place, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        return (np.abs(place) < length) & (np.abs(across) < width)
    sides = [angle + turn * 2 * np.pi / 3 for turn in range(3)]
    return np.all([x * np.cos(a) + y * np.sin(a) < size / 2 for a in sides], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help=".npz file to write")
    parser.add_argument("--count", type=int, default=600, help="images; default: 600")
    parser.add_argument("--side", type=int, default=48, help="pixels of a side; default: 48")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images = draw(arguments.count, arguments.side, arguments.seed)
    np.savez_compressed(arguments.out, images=images)
    print(f"wrote {arguments.out}: {len(images)} images of {images.shape[1]} x {images.shape[2]}")


if __name__ == "__main__":
    main()
