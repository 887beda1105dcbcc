"""Which noise is in images: the mean square error of the guess (Ho et al. 2020).

B images, C channels, S sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.values.memory import to_device
from ...moe.config.model import LayersConfig
from ...moe.config.super_resolution import SuperResolutionConfig
from ...moe.diffusion.ddim import ddim
from ...moe.diffusion.images import larger, smaller
from ...moe.diffusion.measures import psnr
from ...moe.models.super_resolution import SuperResolution
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.super_resolution import ImageData, ImageRows, build_image_data
from ..formats.super_resolution import SuperResolutionDataConfig
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss, Objective


@dataclass(slots=True)
class DenoisedBatch(MicroBatchLoss):
    """The result of one micro-batch, with what the model said."""

    noise_BCSS: Tensor
    """The noise that it found."""


@dataclass(frozen=True, slots=True)
class NoisyRows:
    """Images that are noisy already, for sampling."""

    noisy_BCSS: Tensor
    guide_BCSS: Tensor
    times_B: Tensor


class DenoiseLoss(nn.Module):
    """The squared error of the noise, a target for each pixel and channel."""

    def __init__(self, model: SuperResolution) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: ImageRows | NoisyRows) -> DenoisedBatch:
        """Mix images with their noise and score the guess; of noisy ones only guess."""
        model, here = self.model, self.model.device
        times_B = to_device(rows.times_B, here)
        if isinstance(rows, NoisyRows):
            noisy, guide = (to_device(t, here) for t in (rows.noisy_BCSS, rows.guide_BCSS))
            found = model.denoise(noisy, guide, times_B)
            zero = found.noise_BCHW.new_zeros(())
            return DenoisedBatch(zero, 0, found.routings, found.noise_BCHW)
        images = to_device(rows.images_BCSS, here)
        wanted = to_device(rows.noise_BCSS, here)
        guide = larger(smaller(images, model.config.scale), model.config.scale)
        mixed = model.schedule.add_noise(model.residual(images, guide), wanted, times_B)
        found = model.denoise(mixed, guide, times_B, rows.draw_keys)
        loss = (found.noise_BCHW - wanted).square().sum()
        return DenoisedBatch(loss, wanted.numel(), found.routings, found.noise_BCHW)


class DenoiseObjective(Objective[SuperResolution]):
    """Crops of images, each with its own timestep and noise."""

    model_kinds = ("super_resolution",)
    data: ImageData

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        super().__init__(config, data)
        model, section = config.model, config.data
        assert isinstance(model, SuperResolutionConfig), "check() compares the kinds"
        assert isinstance(section, SuperResolutionDataConfig), "its format asks for this objective"
        self._rows = model.rows_per_image
        self._pixels = model.channels * model.image_size**2
        self._section = section

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> ImageData:
        """Read the images and hold a part out."""
        return build_image_data(config, folder, mesh, stop)

    def complete_model(self, model: LayersConfig) -> LayersConfig:
        """Give the model the standard deviation of the images' residuals, unless it has one."""
        assert isinstance(model, SuperResolutionConfig), "check() compares the kinds"
        if model.residual_std is not None:
            return model
        return model.model_copy(update={"residual_std": self.data.residual_std})

    def module(self, decoder: SuperResolution) -> nn.Module:
        """Return :class:`DenoiseLoss`."""
        return DenoiseLoss(decoder)

    def batch(self, step: int, rows: range, device: torch.device) -> ImageRows:
        """Return some crops of the global batch, on the host: the module moves them."""
        return self.data.train.of_step(step, rows)

    def window_rows(self, step: int, rows: range) -> list[int]:
        """Return the patches of each crop."""
        return [self._rows] * len(rows)

    def divisor(self, step: int) -> int:
        """Return the pixels of the global batch, in all channels."""
        return self.config.train.batch_sequences * self._pixels

    def num_tokens(self, steps: range) -> int:
        """Return the patches of the global batches."""
        return len(steps) * self.config.train.batch_sequences * self._rows

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score held-out crops at fixed timesteps with fixed noise, and enlarge a few."""
        held_out = self.data.held_out

        def part_of(images: Sequence[int]) -> MicroBatchLoss:
            part: DenoisedBatch = module(held_out.fixed(list(images)))
            return part

        loss, num_targets = self.score(part_of, module, len(held_out), mesh)
        metrics = {"eval_loss": loss}
        if self._section.eval_images:
            metrics["eval_psnr"] = self._psnr(module, mesh)
        return HeldOut(metrics, num_targets // self._pixels * self._rows)

    def _psnr(self, module: nn.Module, mesh: Mesh) -> float:
        """Return the mean PSNR of a few held-out crops that the model enlarges, in dB."""
        assert isinstance(module, DenoiseLoss), "module() made it"
        model, held_out = module.model, self.data.held_out
        count = min(self._section.eval_images, len(held_out))
        chosen = [place * len(held_out) // count for place in range(count)]
        rows = held_out.fixed(chosen[mesh.dp_rank :: mesh.dp_size])
        images = rows.images_BCSS
        guide = larger(smaller(images, model.config.scale), model.config.scale)

        def predict(x_BCHW: Tensor, time: int, following: int | None) -> Tensor:
            times_B = torch.full_like(rows.times_B, time)
            found: DenoisedBatch = module(NoisyRows(x_BCHW, guide, times_B))
            return found.noise_BCSS.cpu()

        def bound(residual_BCHW: Tensor) -> Tensor:
            return model.residual(model.image(residual_BCHW, guide), guide)

        module.eval()
        with torch.no_grad():
            steps = self._section.eval_steps
            residual = ddim(predict, model.schedule, rows.noise_BCSS, steps, bound=bound)
        module.train()
        values_B = psnr(model.image(residual, guide), images)
        sums = torch.stack([values_B.sum(), torch.tensor(len(values_B)).double()])
        total, number = mesh.sum(sums).tolist()
        return total / number
