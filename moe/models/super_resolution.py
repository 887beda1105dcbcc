"""A super-resolution model: which noise is in enlarged images, patch by patch.

T tokens, D model width, B images, C channels; images are ``[B, C, H, W]`` from -1 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.full import full_rows
from ..batch import Batch
from ..config.super_resolution import SuperResolutionConfig
from ..diffusion.frequency import FrequencyFilter
from ..diffusion.images import images_of, patches_of
from ..diffusion.positions import grid_positions, time_features
from ..diffusion.schedule import Schedule
from ..linear import FromZero, Linear
from ..routers.routing import Lookahead, Routing
from .model import ModelOutput, WholeModel
from .options import WHOLE, ModelOptions
from .routed import choose
from .super_resolution_layer import SuperResolutionLayer, of_rows


@dataclass(slots=True)
class Denoised:
    """What the model says of noisy images."""

    noise_BCHW: Tensor
    """The noise in them, at least in fp32."""
    routings: list[Routing]
    """One for each MoE layer."""


class SuperResolution(WholeModel):
    """Noisy images and enlarged small ones in, the noise out.

    What is noisy is not an image but its difference from the enlarged small one, divided by
    ``config.std``: :meth:`residual` and :meth:`image` turn one into the other.
    """

    config: SuperResolutionConfig

    def __init__(self, config: SuperResolutionConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__(config, options)
        self.schedule = Schedule(config.timesteps, config.beta_start, config.beta_end)
        width, pixels = config.d_model, config.channels * config.patch**2
        self.patches_in = Linear(2 * pixels, width, bias=True)
        self.time_in = Linear(width, width, bias=True)
        self.time_mlp = Linear(width, width, bias=True)
        self.layers = nn.ModuleList(SuperResolutionLayer(config, i, options) for i in self.stage)
        self.norm = nn.LayerNorm(width, config.norm_eps, False)
        self.modulation = FromZero(width, 2 * width)
        self.patches_out = FromZero(width, pixels)
        self.frequency_filter: FrequencyFilter | None = None
        if config.frequency_bands:
            bands = config.frequency_bands
            self.frequency_filter = FrequencyFilter(width, config.channels, bands)

    def residual(self, image_BCHW: Tensor, guide_BCHW: Tensor) -> Tensor:
        """Return what noise is added to, of images and enlarged small ones."""
        return (image_BCHW - guide_BCHW) / self.config.std

    def image(self, residual_BCHW: Tensor, guide_BCHW: Tensor) -> Tensor:
        """Return the image of a residual, from -1 to 1."""
        return (guide_BCHW + self.config.std * residual_BCHW).clamp(-1, 1)

    def denoise(
        self,
        noisy_BCHW: Tensor,
        guide_BCHW: Tensor,
        times_B: Tensor,
        draw_keys: Sequence[int] | None = None,
        next_times_B: Tensor | None = None,
    ) -> Denoised:
        """Return the noise in residuals at the timesteps ``times_B`` (int64).

        The layers say a mixture of noise and residual (:meth:`.Schedule.noise_of`), which is as
        hard at every timestep; the noise follows from it.

        ``guide_BCHW`` are the enlarged small images. ``draw_keys`` has a number for each image,
        from which routers draw in training. With ``next_times_B``, those of the next call for the
        same images, its experts are announced while this one still computes.
        """
        rows = noisy_BCHW[0, 0].numel() // self.config.patch**2 if len(noisy_BCHW) else 0
        batch = image_batch(rows, times_B, draw_keys)
        following = None
        if next_times_B is not None:
            following = image_batch(rows, next_times_B)
        both = torch.cat([noisy_BCHW, guide_BCHW], dim=1).to(self.patches_in.weight.dtype)
        height, width = (side // self.config.patch for side in noisy_BCHW.shape[-2:])
        x_TD = self.patches_in(patches_of(both, self.config.patch))
        positions_LD = grid_positions(height, width, self.config.d_model).to(x_TD)
        x_TD = x_TD + positions_LD.repeat(len(times_B), 1)
        time_BD = self._time(times_B)
        output = self(batch, x_TD, time_BD, following)
        patches_TP = self._patches(output.hidden_TD, time_BD)
        said_BCHW = images_of(patches_TP, self.config.patch, noisy_BCHW.shape)
        noisy_BCHW, guide_BCHW = noisy_BCHW.to(said_BCHW), guide_BCHW.to(said_BCHW)
        if self.frequency_filter is not None:
            said_BCHW = self.frequency_filter(said_BCHW, noisy_BCHW, guide_BCHW, time_BD)
        return Denoised(self.schedule.noise_of(said_BCHW, noisy_BCHW, times_B), output.routings)

    def forward(
        self, batch: Batch, x_TD: Tensor, time_BD: Tensor, following: Batch | None = None
    ) -> ModelOutput:
        """Run the layers on embedded patches; ``batch`` says which of them are an image.

        ``following`` is the batch of the next forward, if that is known.
        """
        rows = full_rows(batch)
        early = self.route_from_tokens(batch)
        later = {} if following is None else self._known_choices(following)
        experts_of, routings = dict(self.moe_layers()), []
        for index, layer in enumerate(self.layers):
            output = self.run_layer(layer, x_TD, time_BD, batch, rows, early.get(index))
            x_TD = output.x_TD
            if output.routing is not None:
                routings.append(output.routing)
            if index in later:  # not before: this forward's experts were still needed
                experts_of[index].experts.announce(later[index])
        return ModelOutput(x_TD, routings)

    def _known_choices(self, batch: Batch) -> dict[int, Routing]:
        """Return, by layer, the choices that a batch decides before its forward."""
        return {
            index: choose(index, layer, None, batch)
            for index, layer in self.moe_layers()
            if layer.lookahead is Lookahead.TOKEN
        }

    def _time(self, times_B: Tensor) -> Tensor:
        """Return what layers read of the timesteps, ``[B, D]``."""
        features_BD = time_features(times_B, self.config.d_model)
        features_BD = features_BD.to(self.time_in.weight)
        return F.silu(self.time_mlp(F.silu(self.time_in(features_BD))))

    def _patches(self, hidden_TD: Tensor, time_BD: Tensor) -> Tensor:
        """Return the pixels of each token's patch, at least in fp32."""
        shift_TD, scale_TD = of_rows(self.modulation(time_BD), len(hidden_TD)).chunk(2, dim=1)
        read_TD = self.norm(hidden_TD) * (1 + scale_TD) + shift_TD
        patches_TP: Tensor = self.patches_out(read_TD)
        return patches_TP.to(torch.promote_types(patches_TP.dtype, torch.float32))


def image_batch(rows: int, times_B: Tensor, draw_keys: Sequence[int] | None = None) -> Batch:
    """Return images of ``rows`` tokens each as sequences; patches have no token ids."""
    count = len(times_B)
    positions_T = torch.arange(rows, device=times_B.device).repeat(count)
    return Batch(
        ids_T=torch.zeros_like(positions_T),
        positions_T=positions_T,
        lengths=(rows,) * count,
        timesteps_T=times_B.repeat_interleave(rows),
        draw_keys=None if draw_keys is None else tuple(draw_keys),
    )
