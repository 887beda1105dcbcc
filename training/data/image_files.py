"""Images as arrays of bytes: from ``.npz`` files, and from folders by Pillow.

N images; arrays are ``[N, H, W, C]``.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, DataError
from ...moe.arrays import Array, ArrayFile
from .presence import existing

Bytes = npt.NDArray[np.uint8]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of images with so many channels."""
DEEP = 65535
"""The brightest value of 16 bits."""


def read_images(
    source: str, field: str, key: str, channels: int, advance: Callable[[], object] = lambda: None
) -> Bytes:
    """Return all images of a source; ``field`` names it in messages.

    ``advance`` is called before each file, and may raise.

    Raises :class:`DataError` for images that cannot be used, :class:`ConfigError` for a source that
    is none, or without Pillow.
    """
    path = existing(source, field)
    if path.is_dir():
        return _of_folder(path, field, channels, advance)
    if not is_array_file(path) or not path.is_file():
        raise ConfigError(
            f"{field} is {source!r}, but data.format is super_resolution; give a .npz file with an "
            "array of images, or a folder of image files."
        )
    advance()
    return _of_array(_array(path, field, key), f"{field} {source!r}", channels)


def is_array_file(path: Path) -> bool:
    """Say whether a name is that of an array file, in small letters or not."""
    return path.suffix.lower() == ".npz"


def image_paths(folder: Path) -> list[Path]:
    """Return the image files of a folder and below it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def read_bytes(path: Path, channels: int) -> Bytes:
    """Return :func:`read_image` with 8 bits: greys of 16 bits are rounded."""
    image = read_image(path, channels)
    return image if image.dtype == np.uint8 else (image / (DEEP / 255)).round().astype(np.uint8)


def read_image(path: Path, channels: int) -> Array:
    """Return an image file as ``[H, W, C]``: uint8, or uint16 for greys of 16 bits.

    Raises :class:`DataError` for a file that is no image, and :class:`ConfigError` for channels
    that no image file has, or without Pillow.
    """
    mode = _mode(channels)
    numbers = read_numbers(path, mode)
    if numbers.ndim == 3:
        return numbers
    image = np.stack([numbers] * channels, axis=-1)
    if mode == "RGBA":
        image[..., 3] = DEEP
    return image


def read_numbers(path: Path, mode: str | None) -> Array:
    """Return an image file's numbers, converted to a mode of 8 bits; None keeps all as they are.

    Greys of 16 bits stay ``[H, W]``: Pillow would cut them off at 255. Raises :class:`DataError`
    for what cannot be read or converted.
    """
    pillow = open_pillow()
    try:
        with pillow.open(path) as image:
            if image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.uint16)  # some files have the other byte order
            if mode is None:
                return np.asarray(image)
            if image.mode in ("I", "F"):
                raise ValueError("it has 32 bits for a pixel, of 8 and 16")
            return np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); give another file, or take it out."
        ) from None


def open_pillow() -> Any:
    """Return Pillow's module; raise :class:`ConfigError` where it is not installed."""
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError:
        raise ConfigError(
            "image files need a package that is not installed (pillow); "
            "pip install 'moeyard[images]', or give a .npz file."
        ) from None


def _mode(channels: int) -> str:
    if channels not in MODES:
        raise ConfigError(
            f"model.channels is {channels}, which image files do not have; use one of "
            f"{', '.join(map(str, MODES))}, or a .npz file."
        )
    return MODES[channels]


def _of_folder(folder: Path, field: str, channels: int, advance: Callable[[], object]) -> Bytes:
    paths = image_paths(folder)
    if not paths:
        raise DataError(
            f"{field} is {str(folder)!r}, which has no images; give a folder with files such as "
            "a.png."
        )
    images: list[Bytes] = []
    for path in paths:
        advance()
        image = read_bytes(path, channels)
        if images and image.shape != images[0].shape:
            one, other = (f"{i.shape[1]} x {i.shape[0]}" for i in (image, images[0]))
            raise DataError(
                f"{path} has {one} pixels and {paths[0].name} {other}; cut or resize the images "
                "to one size."
            )
        images.append(image)
    return np.stack(images)


def _array(path: Path, field: str, key: str) -> Array:
    file = ArrayFile(path, field)
    if key not in file.shapes:
        names = ", ".join(sorted(file.shapes)[:5])
        raise DataError(
            f"{field} {str(path)!r} has no array {key!r}, but {names or 'nothing'}; name one with "
            "data.images_key."
        )
    return file.read(key)


def _of_array(images: Array, name: str, channels: int) -> Bytes:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not images.size:
        raise DataError(
            f"{name} has an array of shape {list(images.shape)}; give images of one size as "
            "[images, rows, columns] or with channels behind."
        )
    if images.shape[3] != channels:
        raise DataError(
            f"{name} has images with {images.shape[3]} channel(s), but model.channels is "
            f"{channels}; change one of them."
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{name} has values of type {images.dtype}; give bytes, or numbers from 0 to 1."
        )
    low, high = float(images.min()), float(images.max())
    if not 0 <= low <= high <= 1:  # also for NaN
        wrong = high if low >= 0 else low
        raise DataError(f"{name} has the value {wrong:g}; give bytes, or numbers from 0 to 1.")
    return (images * 255).round().astype(np.uint8)


def write_images(path: Path, images_NHWC: Bytes, key: str) -> None:
    """Write images into a ``.npz`` file, or one image into an image file.

    Raises :class:`ConfigError` for a file that cannot be written.
    """
    try:
        if is_array_file(path):
            arrays: dict[str, Any] = {key: images_NHWC}
            with path.open("wb") as file:  # by name, numpy would write X.NPZ.npz
                np.savez_compressed(file, **arrays)
            return
        (image_HWC,) = images_NHWC
        if image_HWC.shape[2] == 1:
            image_HWC = image_HWC[..., 0]
        open_pillow().fromarray(image_HWC).save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written ({error}); name another file.") from None
