"""What a vision model says of an image: the entries of ``model.tasks``."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CLASSES = 255
"""Classes of a pixel: a byte holds them, and one value that means none."""
MOST_LABELS = 1 << 16


class VisionTask(BaseModel):
    """What all tasks have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    """How data, measures and commands name the task: small letters, digits and ``_``."""
    kind: str
    """What the task says; a subclass has one value."""
    loss_weight: float = Field(default=1.0, gt=0)
    """Factor on the task's loss in training."""


class ClassesTask(VisionTask):
    """A label for each image."""

    kind: Literal["classes"] = "classes"
    """One label for each image."""
    labels: tuple[str, ...] = Field(default=(), max_length=MOST_LABELS)
    """What an image may be, in the order of the head's rows; training fills them in from the
    data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError(
                f"labels has {len(self.labels)} entries, {len(set(self.labels))} different; "
                "give two or more, each once."
            )
        return self


class PixelClassesTask(VisionTask):
    """A class for each pixel: segmentation, or edges with two classes."""

    kind: Literal["pixel_classes"] = "pixel_classes"
    """A class for each pixel."""
    classes: int = Field(ge=2, le=MOST_CLASSES)
    """Classes; their numbers begin at 0. 255 in a map means that a pixel has none."""


class PixelValuesTask(VisionTask):
    """Numbers for each pixel: depth, or normals with three channels."""

    kind: Literal["pixel_values"] = "pixel_values"
    """Numbers for each pixel."""
    channels: int = Field(default=1, ge=1, le=4096)
    """Numbers of a pixel."""


AnyTask = Annotated[ClassesTask | PixelClassesTask | PixelValuesTask, Field(discriminator="kind")]


def head_width(task: AnyTask, patch_pixels: int) -> int:
    """Return the rows of a task's head: a label each, or what each pixel of a patch needs."""
    if isinstance(task, ClassesTask):
        return len(task.labels)
    each = task.classes if isinstance(task, PixelClassesTask) else task.channels
    return each * patch_pixels
