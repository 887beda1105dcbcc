"""The batch that a vision transformer takes.

N passes (an image and a task), L rows each, T = N*L.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels.values.memory import to_device
from .batch import Batch


@dataclass(frozen=True, slots=True)
class ImageBatch(Batch):
    """Images and what is asked of each; ``ids_T`` are the numbers of the rows' tasks."""

    pixels_NCHW: Tensor = field(kw_only=True)
    """Numbers from -1 to 1 (pixels.py)."""

    def to(self, device: torch.device) -> "ImageBatch":
        """See :meth:`Batch.to`."""
        pixels_NCHW, ids_T, positions_T = (
            to_device(t, device) for t in (self.pixels_NCHW, self.ids_T, self.positions_T)
        )
        return replace(
            self, pixels_NCHW=pixels_NCHW, ids_T=ids_T, positions_T=positions_T, tasks_T=ids_T
        )


def image_batch(
    pixels_NCHW: Tensor,
    tasks_N: Tensor,
    num_rows: int,
    draw_keys: tuple[int, ...] | None = None,
) -> ImageBatch:
    """Return a batch of N passes with ``num_rows`` rows each.

    ``tasks_N`` are int64 numbers of tasks. ``draw_keys`` has a number for each pass, which routers
    draw from in training.
    """
    tasks_T = tasks_N.repeat_interleave(num_rows)
    positions_L = torch.arange(num_rows, device=tasks_N.device)
    return ImageBatch(
        ids_T=tasks_T,
        positions_T=positions_L.repeat(len(tasks_N)),
        lengths=(num_rows,) * len(tasks_N),
        tasks_T=tasks_T,
        draw_keys=draw_keys,
        pixels_NCHW=pixels_NCHW,
    )
