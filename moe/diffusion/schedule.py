"""How a diffusion process mixes an image with noise (Ho et al. 2020).

B images, N timesteps; images are ``[B, C, H, W]``.
"""

import torch
from torch import Tensor


class Schedule:
    """``x_t = sqrt(kept_t) x + sqrt(1 - kept_t) noise``, with linear betas.

    ``kept_t`` is the product of ``1 - beta`` over the timesteps 0 to t. Timestep 0 has the least
    noise.
    """

    def __init__(self, timesteps: int, beta_start: float, beta_end: float) -> None:
        wide, here = torch.float64, "cpu"  # in memory even where a model is built without
        betas_N = torch.linspace(beta_start, beta_end, timesteps, dtype=wide, device=here)
        self.kept_N = (1 - betas_N).cumprod(dim=0)
        """fp64: the image's share of the variance at each timestep."""

    def add_noise(self, x_BCHW: Tensor, noise_BCHW: Tensor, times_B: Tensor) -> Tensor:
        """Return the images at the timesteps ``times_B``."""
        kept_B111 = self.kept_N.to(times_B.device)[times_B].view(-1, 1, 1, 1)
        signal, noise = kept_B111.sqrt(), (1 - kept_B111).sqrt()
        return signal.to(x_BCHW) * x_BCHW + noise.to(x_BCHW) * noise_BCHW

    def noise_of(self, mixture_BCHW: Tensor, x_BCHW: Tensor, times_B: Tensor) -> Tensor:
        """Return the noise in ``x_t``, given the mixture ``sqrt(kept) noise - sqrt(1 - kept) x``.

        Noise alone would be near ``x_t`` at late timesteps, and a small error in it would be a
        large one in the image (v-prediction; Salimans and Ho 2022).
        """
        kept_B111 = self.kept_N.to(times_B.device)[times_B].view(-1, 1, 1, 1)
        signal, noise = kept_B111.sqrt(), (1 - kept_B111).sqrt()
        return noise.to(x_BCHW) * x_BCHW + signal.to(x_BCHW) * mixture_BCHW

    def kept(self, time: int | None) -> float:
        """Return the image's share of the variance at a timestep; None = the image itself."""
        return 1.0 if time is None else float(self.kept_N[time])

    def times(self, steps: int) -> list[int]:
        """Return evenly spaced timesteps, from the last to the first; one step takes the last."""
        last = len(self.kept_N) - 1
        if steps == 1:
            return [last]
        return [round(last * place / (steps - 1)) for place in range(steps - 1, -1, -1)]
