"""The ``data`` section of runs that enlarge images."""

from typing import ClassVar, Literal

from pydantic import Field

from .data_section import AnyDataConfig


class SuperResolutionDataConfig(AnyDataConfig):
    """Images, which train a model that enlarges them."""

    loss_unit: ClassVar[str] = "mean square"
    measures: ClassVar[dict[str, str]] = {
        "eval_psnr": "Peak signal-to-noise ratio of enlarged held-out images, in dB",
    }
    batch_is: ClassVar[str] = "{batch} crops of images"

    format: Literal["super_resolution"] = "super_resolution"
    """Large images; the small ones are made of them."""
    source: str
    """A ``.npz`` file with an array of images, ``[N, H, W, C]`` or ``[N, H, W]``, bytes or numbers
    from 0 to 1; or a folder of image files of one size (needs the extra ``images``)."""
    eval_source: str | None = None
    """Held-out images of the same kinds; None holds out ``eval_fraction`` of ``source``."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of ``source`` held out: every n-th image."""
    images_key: str = "images"
    """Name of the array in a ``.npz`` file."""
    eval_images: int = Field(default=8, ge=0)
    """Held-out images that an evaluation enlarges, for ``eval_psnr``; 0 = none."""
    eval_steps: int = Field(default=10, ge=1)
    """Steps in which it does so."""
