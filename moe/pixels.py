"""Images as arrays become what a vision transformer reads.

N images, H height, W width, C channels.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import DataError

SCALES = {"uint8": 255.0, "uint16": 65535.0}
"""The number of a white pixel. Floats are from 0 to 1."""


def check_images(images: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.generic]:
    """Return images as ``[N, H, W, C]`` of a type of ``SCALES`` or fp32; ``name`` is theirs.

    Raises :class:`DataError` for other shapes, other types, and floats outside 0 to 1.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(
            f"{name} has shape {list(images.shape)}; give [images, height, width] or [images, "
            "height, width, channels], all of one size."
        )
    if images.dtype.name in SCALES:
        return images
    if images.dtype.kind != "f":
        raise DataError(
            f"{name} has numbers of type {images.dtype}; give uint8, uint16, or floats from 0 to 1."
        )
    if images.size and not (images.min() >= 0 and images.max() <= 1):  # also for NaN
        raise DataError(
            f"{name} has floats from {images.min():.4g} to {images.max():.4g}; scale them to 0 to "
            "1, or give uint8."
        )
    return images.astype(np.float32)


def to_pixels(images_NHWC: npt.NDArray[np.generic]) -> Tensor:
    """Return images of :func:`check_images` as fp32 ``[N, C, H, W]`` from -1 to 1."""
    white = SCALES.get(images_NHWC.dtype.name, 1.0)
    values = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2), dtype=np.float32)
    return torch.from_numpy(values) * (2.0 / white) - 1.0
