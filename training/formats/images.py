"""Images for several tasks: the ``data`` section with ``format: images``."""

from typing import ClassVar, Literal

from pydantic import Field

from .data_section import AnyDataConfig


class ImagesConfig(AnyDataConfig):
    """Images, with what each task of the model should say of them."""

    loss_unit: ClassVar[str] = "sum over tasks"
    batch_is: ClassVar[str] = "{batch} images"

    format: Literal["images"] = "images"
    """Images with targets, for models of kind ``vit``."""
    source: str
    """A folder of images, or an array file (``.npz``) with ``images`` and an array for each task
    (docs/vision.md)."""
    eval_source: str | None = None
    """Held-out images of the same kind; None holds out ``eval_fraction`` of ``source``."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of ``source`` held out: every n-th image of each label."""
