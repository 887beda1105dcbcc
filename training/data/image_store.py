"""Images with targets on disk, and in the order of training.

N images, P passes (an image and a task), H height, W width, C channels.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ...files import replaced
from ...moe.pixels import to_pixels
from .image_targets import NO_CLASS, NO_LABEL
from .shuffled import SizedItems

Array = npt.NDArray[Any]
DRAW_KEYS = 1 << 32
"""A task's draw keys begin this far behind those of the task before."""


class ImageRows(NamedTuple):
    """Some images, once for each task that has a target, image after image."""

    pixels_PCHW: Tensor
    """fp32, from -1 to 1."""
    tasks_P: Tensor
    """int64: the task's number."""
    places: tuple[Tensor, ...]
    """By task, int64: its passes."""
    targets: tuple[Tensor, ...]
    """By task: the targets of its passes, in the form of image_targets.py."""
    scales: tuple[float, ...]
    """By task: a factor on its loss, so that all sums have the same divisor."""
    draw_keys: tuple[int, ...]
    """A number for each pass, for routers that draw."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a run knows of its images."""

    images: int
    targets: dict[str, int]
    """By task: images with a target."""


def write_images(
    path: Path,
    images_NHWC: Array,
    targets: Mapping[str, Array],
    labels: Mapping[str, Sequence[str]],
    made_from: str,
) -> None:
    """Write images and the targets of each task, whole or not at all.

    ``labels`` are those of tasks that give an image one. ``made_from`` says later if the file is
    still right.
    """
    arrays = {"images": images_NHWC} | {f"target.{name}": one for name, one in targets.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = hashlib.sha256(json.dumps(labels).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    metadata = {
        "made_from": made_from,
        "labels": json.dumps(labels),
        "identity": digest.hexdigest(),
    }
    with replaced(path) as unfinished:
        save_file(arrays, unfinished, metadata=metadata)


class LabelledImages(SizedItems):
    """The images of a file, in a fresh random order each epoch. They are read when needed."""

    def __init__(
        self, path: Path, tasks: Sequence[str], num_rows: int, batch: int, seed: int
    ) -> None:
        """``num_rows`` are the model's rows of an image, ``batch`` the images of a global batch."""
        self._file = safe_open(path, "np")
        metadata = self._file.metadata() or {}
        self.labels: dict[str, list[str]] = json.loads(metadata["labels"])
        self.identity = metadata["identity"]
        self._images = self._file.get_slice("images")
        self._targets = [self._file.get_slice(f"target.{task}") for task in tasks]
        self._has_NT = np.stack(
            [has_target(self._file.get_tensor(f"target.{task}")) for task in tasks], axis=1
        )
        super().__init__((self._has_NT.sum(axis=1) * num_rows).tolist(), batch, seed)
        counts = dict(zip(tasks, self._has_NT.sum(axis=0).tolist(), strict=True))
        self.facts = ImageFacts(len(self), counts)

    def of_step(self, step: int, rows: range) -> ImageRows:
        """Return some rows of the global batch of ``step``.

        A task's scale is the batch's images over those that have a target: then the sum over all
        of the batch, divided by its images, is the mean over targets.
        """
        counts_T = self._has_NT[self.at(step, range(self._batch))].sum(axis=0)
        scales = tuple(self._batch / max(1, int(count)) for count in counts_T)
        return self.rows(self.at(step, rows), scales)

    def rows(self, images: Sequence[int], scales: tuple[float, ...] | None = None) -> ImageRows:
        """Return the passes of ``images``; ``scales`` None = 1."""
        count = self._has_NT.shape[1]
        pairs = [(n, task) for n in images for task in range(count) if self._has_NT[n, task]]
        where = {image: place for place, image in enumerate(dict.fromkeys(images))}
        shape = (0, *self._images.get_shape()[1:])
        raw = [self._images[image : image + 1] for image in where]
        pixels_NCHW = to_pixels(np.concatenate(raw) if raw else np.zeros(shape, np.uint8))
        index_P = torch.tensor([where[image] for image, _ in pairs], dtype=torch.int64)
        tasks_P = torch.tensor([task for _, task in pairs], dtype=torch.int64)
        own = [[image for image, task in pairs if task == number] for number in range(count)]
        return ImageRows(
            pixels_PCHW=pixels_NCHW[index_P],
            tasks_P=tasks_P,
            places=tuple((tasks_P == number).nonzero().squeeze(1) for number in range(count)),
            targets=tuple(map(self._targets_of, range(count), own)),
            scales=scales or (1.0,) * count,
            draw_keys=tuple(image + task * DRAW_KEYS for image, task in pairs),
        )

    def _targets_of(self, task: int, images: list[int]) -> Tensor:
        target = self._targets[task]
        found = [target[image : image + 1] for image in images]
        return torch.from_numpy(np.concatenate(found) if found else target[0:0])


def has_target(targets: Array) -> npt.NDArray[np.bool_]:
    """Return which images have a target, by the forms of image_targets.py."""
    if targets.dtype == np.int32:
        there = targets != NO_LABEL
    elif targets.dtype == np.uint8:
        there = targets != NO_CLASS
    else:
        there = ~np.isnan(targets)
    found: npt.NDArray[np.bool_] = there.reshape(len(targets), -1).any(axis=1)
    return found
