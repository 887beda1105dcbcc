"""A vision transformer that does one task at a time on images.

N images, C classes or channels, H height, W width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ..config.vision_tasks import AnyTask, ClassesTask, PixelClassesTask
from ..image_batch import image_batch
from ..pixels import check_images, to_pixels
from .describe import describe
from .vit import ViT

Array = npt.NDArray[Any]


class Labelled(NamedTuple):
    """What an image is."""

    label: str
    """The likeliest label."""
    probabilities: dict[str, float]
    """Of all labels, in the model's order."""


class VisionModel:
    """A vision transformer that :func:`moeyard.load_vision` opened. Call it with images and a task.

    ``config`` has its shape, ``vit`` is the torch module.
    """

    def __init__(self, vit: ViT) -> None:
        unlabelled = [
            task.name
            for task in vit.config.tasks
            if isinstance(task, ClassesTask) and not task.labels
        ]
        if unlabelled:
            raise ConfigError(
                f"the model has no labels for the task {unlabelled[0]!r}, so it cannot do it; "
                "train one with data.format images."
            )
        self.vit = vit.eval()
        self.config = vit.config

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device, the share on disk and tasks."""
        tasks = ", ".join(f"{task.name} ({task.kind})" for task in self.config.tasks)
        return f"VisionModel({describe(self.vit)}\n  tasks: {tasks}\n)"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(task.name for task in self.config.tasks)

    def task(self, name: str | None = None) -> AnyTask:
        """Return a task by its name; the only one without. Raises :class:`ConfigError`."""
        if name is None and len(self.tasks) == 1:
            name = self.tasks[0]
        if name not in self.tasks:
            raise ConfigError(f"task is {name!r}; use one of {', '.join(self.tasks)}.")
        return self.config.tasks[self.config.task_number(name)]

    def __call__(
        self, images: Array | Sequence[Array], task: str | None = None, batch_images: int = 16
    ) -> list[Labelled] | Array:
        """Return what ``task`` says of each image.

        Images are ``[N, H, W]`` or ``[N, H, W, C]``, of uint8, uint16, or floats from 0 to 1. A
        task of labels gives a list of :class:`Labelled`; one of pixels' classes uint8
        ``[N, H, W]``; one of pixels' values fp32 ``[N, H, W, C]``. Raises :class:`ConfigError` for
        tasks and sizes that the model does not have, and :class:`DataError` for other arrays.
        """
        chosen = self.task(task)
        scores = self.scores(images, chosen.name, batch_images)
        if isinstance(chosen, PixelClassesTask):
            classes: Array = scores.argmax(dim=1).to(torch.uint8).numpy()
            return classes
        if not isinstance(chosen, ClassesTask):
            values: Array = scores.permute(0, 2, 3, 1).contiguous().numpy()
            return values
        found = []
        for shares in scores.softmax(dim=1).tolist():
            best = max(range(len(shares)), key=shares.__getitem__)
            by_label = dict(zip(chosen.labels, shares, strict=True))
            found.append(Labelled(chosen.labels[best], by_label))
        return found

    @torch.inference_mode()
    def scores(
        self, images: Array | Sequence[Array], task: str | None = None, batch_images: int = 16
    ) -> Tensor:
        """Return a task's scores or values, fp32 ``[N, C]`` or ``[N, C, H, W]`` on the CPU."""
        if batch_images < 1:
            raise ConfigError(f"batch_images is {batch_images}; use a number from 1 upwards.")
        chosen = self.task(task)
        checked = self._checked(images)
        number, device = self.config.task_number(chosen.name), self.vit.device
        parts = []
        for start in range(0, len(checked), batch_images):
            pixels_NCHW = to_device(to_pixels(checked[start : start + batch_images]), device)
            tasks_N = torch.full((len(pixels_NCHW),), number, device=device)
            hidden_TD = self.vit(image_batch(pixels_NCHW, tasks_N, self.config.num_rows)).hidden_TD
            parts.append(self.vit.answer(hidden_TD, chosen).float().cpu())
        return torch.cat(parts)

    def _checked(self, images: Array | Sequence[Array]) -> Array:
        if not isinstance(images, np.ndarray):
            sizes = sorted({np.shape(image) for image in images})
            if len(sizes) > 1:
                raise ConfigError(
                    f"the images have the sizes {sizes[0]} and {sizes[1]}; bring them to one."
                )
            images = np.array(images)
        if not len(images):
            raise ConfigError("there are no images; give one or more.")
        checked = check_images(images, "the images' array")
        wanted = (*self.config.image_size, self.config.channels)
        if checked.shape[1:] != wanted:
            raise ConfigError(
                f"an image has height, width and channels {checked.shape[1:]}, but the model reads "
                f"{wanted}; bring images to its size."
            )
        return checked
