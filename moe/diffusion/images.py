"""Images between files and models, and their sizes.

Models see ``[B, C, H, W]`` from -1 to 1; files have bytes, ``[B, H, W, C]``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 127.5
"""Of a byte's range."""


def from_bytes(images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Return images as models see them, fp32."""
    images_BCHW = torch.from_numpy(np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2)))
    return images_BCHW.float() / HALF - 1


def to_bytes(images_BCHW: Tensor) -> npt.NDArray[np.uint8]:
    """Return images as files have them."""
    bytes_BCHW = ((images_BCHW.float() + 1) * HALF).round().clamp(0, 255).byte()
    return bytes_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def smaller(images_BCHW: Tensor, scale: int) -> Tensor:
    """Return images whose sides are ``scale`` times shorter: the means of squares."""
    return F.avg_pool2d(images_BCHW, scale)


def larger(images_BCHW: Tensor, scale: int) -> Tensor:
    """Return images whose sides are ``scale`` times longer, by bicubic interpolation."""
    sizes = [side * scale for side in images_BCHW.shape[-2:]]
    if not len(images_BCHW):
        return images_BCHW.new_empty(0, images_BCHW.shape[1], *sizes)
    found_BCHW = F.interpolate(images_BCHW, size=sizes, mode="bicubic", align_corners=False)
    return found_BCHW.clamp(-1, 1)


def patches_of(images_BCHW: Tensor, patch: int) -> Tensor:
    """Return the squares of ``patch`` pixels, row by row: ``[B * L, C * patch * patch]``."""
    squares = images_BCHW.unfold(2, patch, patch).unfold(3, patch, patch)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)


def images_of(patches_TP: Tensor, patch: int, size: Sequence[int]) -> Tensor:
    """Return the images ``[B, C, H, W]`` of :func:`patches_of`; ``size`` is their shape."""
    num, channels, height, width = size
    shape = (num, height // patch, width // patch, channels, patch, patch)
    return patches_TP.view(shape).permute(0, 3, 1, 4, 2, 5).reshape(tuple(size))
