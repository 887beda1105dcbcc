"""Images and targets in a folder.

``CLASS/NAME.png`` is an image, whose label is the folder below the source. ``NAME.TASK.png`` or
``NAME.TASK.npy`` next to it is its map for a task of pixels.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...errors import DataError
from ...moe.arrays import read_array
from ...moe.config.vision_tasks import AnyTask, ClassesTask, PixelClassesTask
from ...moe.config.vit import ViTConfig
from ...moe.pixels import SCALES
from .image_files import SUFFIXES, read_image, read_numbers
from .image_targets import NO_CLASS, Array, read_maps


class ImageFolder:
    """The images of a folder and below it, in the order of their names."""

    def __init__(self, source: str, field: str, config: ViTConfig) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        self._root, self._field, self._config = Path(source), field, config
        self._tasks = {task.name: task for task in config.tasks}
        found = sorted(path for path in self._root.rglob("*") if path.is_file())
        maps = {path for path in found if self._is_map(path)}
        self.images = [p for p in found if p.suffix.lower() in SUFFIXES and p not in maps]
        self.paths = [*self.images, *sorted(maps)]
        if not self.images:
            raise DataError(
                f"{field} is {source!r}, a folder without images; give one with "
                f"{', '.join(SUFFIXES)} files, or an .npz file."
            )
        self._maps = {(p.parent, *p.name.rsplit(".", 2)[:2]): p for p in sorted(maps)}
        stems = {(path.parent, path.stem) for path in self.images}
        lonely = next((p for key, p in self._maps.items() if key[:2] not in stems), None)
        if lonely is not None:
            raise DataError(
                f"{lonely} is a map, but {lonely.name.rsplit('.', 2)[0]}.png is not there; give "
                "its image, or take it out."
            )

    def _is_map(self, path: Path) -> bool:
        parts = path.name.rsplit(".", 2)
        task = self._tasks.get(parts[1]) if len(parts) == 3 else None
        is_readable = path.suffix.lower() in (*SUFFIXES, ".npy")
        return task is not None and not isinstance(task, ClassesTask) and is_readable

    def read_images(self, advance: Callable[[], object]) -> Array:
        """Return all images, ``[N, H, W, C]``; raise :class:`DataError` where they differ.

        ``advance`` is called before each file.
        """
        images: list[Array] = []
        for path in self.images:
            advance()
            image = read_image(path, self._config.channels)
            if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
                raise DataError(
                    f"{path} has {image.shape[0]} x {image.shape[1]} pixels of {image.dtype}, but "
                    f"{self.images[0]} has {images[0].shape[0]} x {images[0].shape[1]} of "
                    f"{images[0].dtype}; bring all images to one size and type."
                )
            images.append(image)
        return np.stack(images)

    def read_targets(self, task: AnyTask, advance: Callable[[], object]) -> Array | None:
        """Return the raw targets of a task for all images; None if there are none at all."""
        if isinstance(task, ClassesTask):
            return self._folders(task)
        found = []
        for path in self.images:
            advance()
            found.append(self._map_of(path, task))
        some = next((one for one in found if one is not None), None)
        if some is None:
            return None
        nothing = NO_CLASS if isinstance(task, PixelClassesTask) else np.nan
        empty = np.full_like(some, nothing)
        return np.stack([empty if one is None else one for one in found])

    def _folders(self, task: ClassesTask) -> Array | None:
        count = sum(isinstance(other, ClassesTask) for other in self._tasks.values())
        if count > 1:
            raise DataError(
                f"{self._field} is {str(self._root)!r}, and {count} tasks want labels of images, "
                f"{task.name!r} among them, but folders give one; use an .npz file."
            )
        parts = [path.relative_to(self._root).parts for path in self.images]
        labels = [names[0] if len(names) > 1 else "" for names in parts]
        return np.array(labels) if any(labels) else None

    def _map_of(self, path: Path, task: AnyTask) -> Array | None:
        own = self._maps.get((path.parent, path.stem, task.name))
        if own is None:
            return None
        if own.suffix.lower() == ".npy":
            values = read_array(own)
        else:
            values = read_numbers(own, None)
            if not isinstance(task, PixelClassesTask):
                values = values.astype(np.float32) / SCALES.get(values.dtype.name, 1.0)
        return read_maps(values[None], task, self._config.image_size, str(own))[0]
