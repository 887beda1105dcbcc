"""A filter by bands of frequencies, in the spirit of SS-MoE's frequency compensation.

B images, C channels, K bands, P = 3 parts. Images are ``[B, C, H, W]``.
"""

import torch
from torch import Tensor, nn

from ..linear import FromZero


class FrequencyFilter(nn.Module):
    """Corrects a guess of the noise in each band of frequencies, by what the timestep says.

    Patches are guessed side by side, which is weakest for high frequencies and at their borders.
    In each band, the guess, the noisy image and the enlarged small one are each multiplied by a
    learned factor, and the three are added to the guess. All factors begin at 0. (Luo et al. 2023
    compensate features of a decoder in the frequency domain.)
    """

    def __init__(self, d_model: int, channels: int, bands: int) -> None:
        super().__init__()
        self.channels, self.bands = channels, bands
        self.gains = FromZero(d_model, 3 * channels * bands)

    def forward(
        self, noise_BCHW: Tensor, noisy_BCHW: Tensor, guide_BCHW: Tensor, time_BD: Tensor
    ) -> Tensor:
        """Return the corrected noise."""
        if not len(noise_BCHW):  # FFTs refuse it
            return noise_BCHW
        parts_BPCHW = torch.stack([noise_BCHW, noisy_BCHW, guide_BCHW], dim=1)
        height, width = noise_BCHW.shape[-2:]
        size = (height, width)
        gains_BPCK = self.gains(time_BD).to(parts_BPCHW).unflatten(1, (3, self.channels, -1))
        gains_BPCHW = torch.einsum(
            "bpck,khw->bpchw", gains_BPCK, band_weights(size, self.bands).to(parts_BPCHW)
        )
        spectrum_BCHW = (gains_BPCHW * torch.fft.rfft2(parts_BPCHW)).sum(dim=1)
        return noise_BCHW + torch.fft.irfft2(spectrum_BCHW, s=size)


def band_weights(size: tuple[int, int], bands: int) -> Tensor:
    """Return each band's share of each frequency of ``rfft2``, fp64 ``[K, H, W // 2 + 1]``.

    Bands are evenly spaced from frequency 0 to the highest one. A frequency between two belongs to
    both, in proportion, so shares add up to 1.
    """
    height, width = size
    up_H1 = torch.fft.fftfreq(height, dtype=torch.float64).unsqueeze(1)
    along_W = torch.fft.rfftfreq(width, dtype=torch.float64)
    places_HW = torch.hypot(up_H1, along_W) / 0.5**0.5 * (bands - 1)
    centres_K11 = torch.arange(bands, dtype=torch.float64).view(-1, 1, 1)
    return (1 - (places_HW - centres_K11).abs()).clamp(min=0)
