"""Images and targets in an array file: ``images``, and an array for each task."""

import zipfile
from pathlib import Path

import numpy as np

from ...errors import DataError
from ...moe.config.vision_tasks import AnyTask
from .image_targets import Array

IMAGES = "images"


class ImageArrays:
    """The arrays of an ``.npz`` file."""

    def __init__(self, source: str, field: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        self.paths = [Path(source)]
        try:
            with np.load(source, allow_pickle=False) as file:
                self._arrays: dict[str, Array] = dict(file)
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{field} is {source!r}, which cannot be read as an .npz file ({error}); write one "
                "with numpy.savez, of numbers and words."
            ) from None
        if IMAGES not in self._arrays:
            raise DataError(
                f"{field} is {source!r}, which has no array {IMAGES!r}, only "
                f"{', '.join(sorted(self._arrays)) or 'none'}; name the images so."
            )
        for name, array in self._arrays.items():
            if array.ndim == 0 or len(array) != len(self._arrays[IMAGES]):
                raise DataError(
                    f"{source} has {len(self._arrays[IMAGES])} images, but the array {name!r} has "
                    f"shape {list(array.shape)}; give a target for each image."
                )

    def read_images(self) -> Array:
        """Return all images."""
        return self._arrays[IMAGES]

    def read_targets(self, task: AnyTask) -> Array | None:
        """Return the raw targets of a task; None if the file has none."""
        return self._arrays.get(task.name)
