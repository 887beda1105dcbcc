"""Images as arrays of bytes: from ``.npz`` files, and from folders by Pillow.

N images; arrays are ``[N, H, W, C]``.
"""

import importlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, DataError

Bytes = npt.NDArray[np.uint8]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of images with so many channels."""


def read_images(source: str, field: str, key: str, channels: int) -> Bytes:
    """Return all images of a source; ``field`` names it in messages.

    Raises :class:`DataError` for images that cannot be used, :class:`ConfigError` for a source that
    is none, or without Pillow.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, field, channels)
    if path.suffix != ".npz" or not path.is_file():
        raise ConfigError(
            f"{field} is {source!r}, but data.format is super_resolution; give a .npz file with an "
            "array of images, or a folder of image files."
        )
    return _of_array(_array(path, field, key), f"{field} {source!r}", channels)


def read_image(path: Path, channels: int) -> Bytes:
    """Return one image file as ``[H, W, C]``; see :func:`read_images` for the errors."""
    pillow, mode = open_pillow(), _mode(channels)
    try:
        with pillow.open(path) as image:
            found = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); give another file."
        ) from None
    return found.reshape(*found.shape[:2], channels)


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


def _of_folder(folder: Path, field: str, channels: int) -> Bytes:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(
            f"{field} is {str(folder)!r}, which has no images; give a folder with files such as "
            "a.png."
        )
    images: list[Bytes] = []
    for path in paths:
        image = read_image(path, channels)
        if images and image.shape != images[0].shape:
            one, other = (f"{i.shape[1]} x {i.shape[0]}" for i in (image, images[0]))
            raise DataError(
                f"{path} has {one} pixels and {paths[0].name} {other}; cut or resize the images "
                "to one size."
            )
        images.append(image)
    return np.stack(images)


def _array(path: Path, field: str, key: str) -> npt.NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if key not in file:
                names = ", ".join(sorted(file)[:5])
                raise DataError(
                    f"{field} {str(path)!r} has no array {key!r}, but {names or 'nothing'}; name "
                    "one with data.images_key."
                )
            found: npt.NDArray[Any] = file[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{field} {str(path)!r} cannot be read ({error}); write it again with numpy.savez."
        ) from None
    return found


def _of_array(images: npt.NDArray[Any], name: str, channels: int) -> Bytes:
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
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {key: images_NHWC}
            np.savez_compressed(path, **arrays)
            return
        (image_HWC,) = images_NHWC
        if image_HWC.shape[2] == 1:
            image_HWC = image_HWC[..., 0]
        open_pillow().fromarray(image_HWC).save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written ({error}); name another file.") from None
