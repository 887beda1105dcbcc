"""What tasks should say of images, checked and brought to one form each.

N images, H height, W width, C channels of a pixel's values.

| task | form | no target |
|---|---|---|
| classes | int32 ``[N]``, index of the label | -1 |
| pixel_classes | uint8 ``[N, H, W]`` | 255 |
| pixel_values | fp32 ``[N, H, W, C]`` | NaN |
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...moe.config.vision_tasks import AnyTask, ClassesTask, PixelClassesTask

Array = npt.NDArray[Any]
NO_LABEL, NO_CLASS = -1, 255


def read_labels(labels_N: Array, task: ClassesTask, where: str) -> list[str | None]:
    """Return the label of each image as a word; None for -1 and for empty words.

    Raises :class:`DataError` for other numbers below 0, fractions and other types.
    """
    if labels_N.ndim != 1 or labels_N.dtype.kind not in "iuU":
        raise DataError(
            f"{where} has labels of type {labels_N.dtype} and shape {list(labels_N.shape)} for the "
            f"task {task.name!r}; give a whole number or a word for each image."
        )
    if labels_N.dtype.kind == "U":
        return [str(label).strip() or None for label in labels_N]
    if labels_N.size and labels_N.min() < NO_LABEL:
        raise DataError(
            f"{where} has the label {labels_N.min()} for the task {task.name!r}; give numbers from "
            "0 upwards, and -1 for images without a label."
        )
    return [None if label < 0 else str(label) for label in labels_N.tolist()]


def sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """Return labels in order: numbers by value, if all are numbers, else words."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def read_maps(maps: Array, task: AnyTask, size: tuple[int, int], where: str) -> Array:
    """Return the maps of a task of pixels in its form; ``size`` is the images' height and width.

    Raises :class:`DataError` for other sizes, other types and numbers outside the range.
    """
    if isinstance(task, PixelClassesTask):
        return _classes_of_pixels(maps, task, size, where)
    assert not isinstance(task, ClassesTask), "the caller reads labels of images"
    if maps.ndim == 3:
        maps = maps[..., None]
    _check_size(maps.shape[1:], (*size, task.channels), task.name, where)
    if maps.dtype.kind not in "fiu":
        raise DataError(
            f"{where} has {maps.dtype} for the task {task.name!r}; give a number for each pixel."
        )
    values = maps.astype(np.float32)
    if np.isinf(values).any():
        raise DataError(
            f"{where} has infinite numbers for the task {task.name!r}; give finite ones, and NaN "
            "for pixels without a value."
        )
    return values


def _classes_of_pixels(
    maps: Array, task: PixelClassesTask, size: tuple[int, int], where: str
) -> Array:
    if maps.ndim == 4 and maps.shape[-1] == 1:
        maps = maps[..., 0]
    _check_size(maps.shape[1:], size, task.name, where)
    if maps.dtype.kind not in "iu":
        raise DataError(
            f"{where} has {maps.dtype} for the task {task.name!r}; give the number of a class for "
            "each pixel."
        )
    known = (maps >= 0) & (maps < task.classes) | (maps == NO_CLASS) | (maps == NO_LABEL)
    if not known.all():
        raise DataError(
            f"{where} has the class {maps[~known][0]} for the task {task.name!r}, which has "
            f"{task.classes} classes; give numbers from 0 to {task.classes - 1}, and 255 for "
            "pixels without a class."
        )
    return np.where(maps == NO_LABEL, NO_CLASS, maps).astype(np.uint8)


def _check_size(found: tuple[int, ...], wanted: tuple[int, ...], task: str, where: str) -> None:
    if found != wanted:
        raise DataError(
            f"{where} has a map of {_by(found)} for the task {task!r}, where the image needs "
            f"{_by(wanted)}; give maps of the images' size."
        )


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
