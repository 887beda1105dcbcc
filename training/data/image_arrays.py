"""Images and targets in an array file: ``images``, and an array for each task."""

from collections.abc import Callable
from pathlib import Path

from ...errors import DataError
from ...moe.arrays import ArrayFile
from ...moe.config.vision_tasks import AnyTask
from .image_targets import Array

IMAGES = "images"


class ImageArrays:
    """The arrays of an ``.npz`` file. Each is read when it is asked for."""

    def __init__(self, source: str, field: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        self.paths = [Path(source)]
        self._file = ArrayFile(Path(source), field)
        shapes = self._file.shapes
        if IMAGES not in shapes:
            raise DataError(
                f"{field} is {source!r}, which has no array {IMAGES!r}, only "
                f"{', '.join(sorted(shapes)) or 'none'}; name the images so."
            )
        count = (shapes[IMAGES] or (0,))[0]
        for name, shape in shapes.items():
            if shape[:1] != (count,):
                raise DataError(
                    f"{source} has {count} images, but the array {name!r} has shape "
                    f"{list(shape)}; give a target for each image."
                )

    def read_images(self, advance: Callable[[], object] = lambda: None) -> Array:
        """Return all images; ``advance`` is called before each array that is read."""
        advance()
        return self._file.read(IMAGES)

    def read_targets(self, task: AnyTask, advance: Callable[[], object]) -> Array | None:
        """Return the raw targets of a task; None if the file has none."""
        advance()
        return self._file.read(task.name) if task.name in self._file.shapes else None
