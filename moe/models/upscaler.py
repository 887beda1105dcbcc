"""A super-resolution model that enlarges images.

N images, C channels; files' images are bytes ``[N, H, W, C]``, models' ``[N, C, H, W]``.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ..diffusion.ddim import ddim
from ..diffusion.images import from_bytes, larger, to_bytes
from ..diffusion.tiles import Tiles
from .describe import describe
from .initialize import generator_of
from .super_resolution import SuperResolution

Bytes = npt.NDArray[np.uint8]


class Upscaler:
    """A model that :func:`moeyard.load_upscaler` opened. Call it with images.

    ``config`` has its shape, ``model`` is the torch module.
    """

    def __init__(self, model: SuperResolution) -> None:
        self.model = model.eval()
        self.config = model.config
        self.announces_next = True
        """Whether a step tells the expert store what the next one needs. Only for measurements:
        images do not depend on it."""

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device, and how much images grow."""
        config = self.config
        sizes = f"\n  enlarges {config.scale} times, in tiles of {config.image_size} pixels"
        return f"Upscaler({describe(self.model)}{sizes}\n)"

    def __call__(
        self, images: Bytes, steps: int = 20, seed: int = 0, eta: float = 0.0, batch_tiles: int = 16
    ) -> Bytes:
        """Return images, bytes ``[N, H, W, C]`` or one ``[H, W, C]``, with ``scale`` longer sides.

        ``steps`` of DDIM begin with noise of ``seed``: the same for every image, so an image comes
        out the same in any company. ``eta`` is the share of fresh noise in a step, 0 to 1.
        ``batch_tiles`` are computed together. Raises :class:`ConfigError` for what does not fit.
        """
        self._check(images, steps, eta, batch_tiles)
        if images.ndim == 3:
            return self(images[None], steps, seed, eta, batch_tiles)[0]
        guide = larger(from_bytes(images), self.config.scale)
        found = [self.enlarge(one[None], steps, seed, eta, batch_tiles) for one in guide]
        return to_bytes(torch.cat(found))

    @torch.inference_mode()
    def enlarge(
        self, guide_BCHW: Tensor, steps: int, seed: int = 0, eta: float = 0.0, batch_tiles: int = 16
    ) -> Tensor:
        """Return the large images of ones that are enlarged already, fp32 from -1 to 1.

        Images smaller than a tile are computed in one, whose rest repeats their borders.
        """
        model, side = self.model, self.config.image_size
        height, width = guide_BCHW.shape[-2:]
        missing = (0, max(0, side - width), 0, max(0, side - height))
        guide = F.pad(guide_BCHW.float(), missing, mode="replicate").to(model.device)
        tiles = Tiles(guide.shape[-2], guide.shape[-1], side)
        guide_MCSS = tiles.cut(guide)

        def predict(x_BCHW: Tensor, time: int, following: int | None) -> Tensor:
            tiles_MCSS = tiles.cut(x_BCHW)
            parts = []
            for start in range(0, len(tiles_MCSS), batch_tiles):
                some = slice(start, start + batch_tiles)
                is_last = start + batch_tiles >= len(tiles_MCSS)
                times = torch.full((len(tiles_MCSS[some]),), time, device=model.device)
                later = None
                if following is not None and is_last and self.announces_next:
                    later = torch.full_like(times, following)
                found = model.denoise(tiles_MCSS[some], guide_MCSS[some], times, None, later)
                parts.append(found.noise_BCHW.float())
            return tiles.join(torch.cat(parts), x_BCHW)

        def draw(place: int) -> Tensor:
            generator = generator_of(f"upscale/{seed}/{place}")
            noise = torch.randn(guide.shape[1:], generator=generator)
            return noise.expand(guide.shape).to(model.device)

        def bound(residual: Tensor) -> Tensor:
            return model.residual(model.image(residual, guide), guide)

        residual = ddim(predict, model.schedule, draw(-1), steps, eta, draw, bound)
        return model.image(residual, guide)[..., :height, :width].cpu()

    def _check(self, images: Bytes, steps: int, eta: float, batch_tiles: int) -> None:
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            kind = getattr(images, "dtype", type(images).__name__)
            raise ConfigError(f"images are of type {kind}; give a numpy array of bytes (uint8).")
        channels = self.config.channels
        if images.ndim not in (3, 4) or images.shape[-1] != channels or not images.size:
            raise ConfigError(
                f"images have shape {list(images.shape)}; give [images, rows, columns, {channels}] "
                f"or one image, [rows, columns, {channels}]."
            )
        if not 1 <= steps <= self.config.timesteps:
            raise ConfigError(
                f"steps is {steps}; use a number from 1 to {self.config.timesteps}, the model's "
                "timesteps."
            )
        if not 0 <= eta <= 1:
            raise ConfigError(f"eta is {eta}; use a number from 0 to 1.")
        if batch_tiles < 1:
            raise ConfigError(f"batch_tiles is {batch_tiles}; use a number from 1 upwards.")
