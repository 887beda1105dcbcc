"""Large images as overlapping tiles of the size that a model was trained on.

N tiles, B images, S sides of a tile; images are ``[B, C, H, W]``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

OVERLAP = 4
"""Neighbouring tiles share one part in so many of their sides."""


class Tiles:
    """Where the tiles of images of one size are, and what each adds to a pixel."""

    def __init__(self, height: int, width: int, side: int) -> None:
        """``side`` is S; images are at least that large."""
        self._side = side
        self._corners = [
            (up, along) for up in _starts(height, side) for along in _starts(width, side)
        ]
        near_S = torch.arange(1, side + 1, dtype=torch.float32)
        near_S = torch.minimum(near_S, near_S.flip(0)).clamp(max=max(1, side // OVERLAP))
        weights_SS = near_S.unsqueeze(1) * near_S
        total_HW = torch.zeros(height, width)
        for up, along in self._corners:
            total_HW[up : up + side, along : along + side] += weights_SS
        self._weights_NSS = self.cut((weights_SS.new_ones(()) / total_HW)[None, None])[:, 0]
        self._weights_NSS = self._weights_NSS * weights_SS
        is_alone = (self._weights_NSS - 1).abs() < 1e-6
        self._weights_NSS[is_alone] = 1.0  # exactly: a pixel in one tile keeps its bits

    def __len__(self) -> int:
        return len(self._corners)

    def cut(self, images_BCHW: Tensor) -> Tensor:
        """Return the tiles of all images, ``[B * N, C, S, S]``, image by image."""
        tiles = [images_BCHW[..., u : u + self._side, a : a + self._side] for u, a in self._corners]
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def join(self, tiles_MCSS: Tensor, like_BCHW: Tensor) -> Tensor:
        """Return images of tiles: weighted means where they overlap, the middle of a tile most."""
        found_BCHW = torch.zeros_like(like_BCHW)
        tiles_BNCSS = tiles_MCSS.unflatten(0, (len(like_BCHW), len(self)))
        weights_NSS = self._weights_NSS.to(tiles_MCSS)
        for number, (up, along) in enumerate(self._corners):
            part = found_BCHW[..., up : up + self._side, along : along + self._side]
            part += weights_NSS[number] * tiles_BNCSS[:, number]
        return found_BCHW


def _starts(length: int, side: int) -> Iterator[int]:
    """Yield where tiles of ``side`` begin, evenly spaced from the first pixel to the last."""
    step = max(1, side - side // OVERLAP)
    count = -(-(length - side) // step) + 1
    return (round(place * (length - side) / max(1, count - 1)) for place in range(count))
