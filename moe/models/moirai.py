"""Moirai-MoE: a decoder of patches of series, with a distribution for each point of the next patch.

Liu et al. 2024, "Moirai-MoE: Empowering Time Series Foundation Models with Sparse Mixture of
Experts". Each variate is a series by itself: the attention bias between variates is left out.

B series, L points, N patches of a series, P points of a patch, T rows, D model width, S futures of
J patches, H points of a forecast, Q quantiles, M numbers that a patch's distributions are made of.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.parts import parts_of
from ..attention.rope import Rope
from ..config.moirai import MoiraiConfig
from ..kv_cache import SequenceCache
from ..linear import Linear
from ..norm import RMSNorm
from .decoder_layer import DecoderLayer
from .futures import check_request, mean_and_quantiles, uniforms_of
from .mixture import NUM_PARAMETERS, NUM_UNIFORMS, Mixture, mixture_of
from .model import ModelOutput
from .options import WHOLE, ModelOptions
from .patches import (
    PatchBatch,
    Patches,
    batch_after,
    batch_of_patches,
    cut,
    patch_ids,
    scale_of,
    varies,
)
from .series_model import SeriesForecast, SeriesLoss, SeriesModel

FUTURES_TOGETHER = 25
"""Futures of each series that are computed together."""

ROUNDING = 1e-6
"""Of a number of patches, so that 0.3 of 10 patches are 3 and not 4."""


def moirai_layer(config: MoiraiConfig, layer: int, options: ModelOptions = WHOLE) -> DecoderLayer:
    """Return the layer at index ``layer``: that of a decoder."""
    return DecoderLayer(config.decoder, layer, options)


class Moirai(SeriesModel):
    """Patches in, a distribution of the next patch's points out."""

    config: MoiraiConfig
    forecasts_quantiles = True
    """A forecast is a distribution."""

    def __init__(self, config: MoiraiConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__(config, options)
        width = config.d_model
        self.in_proj = Linear(config.patch, width, bias=True)
        self.feat_proj = Linear(width, width, bias=True)
        self.res_proj = Linear(config.patch, width, bias=True)
        self.layers = nn.ModuleList(moirai_layer(config, layer, options) for layer in self.stage)
        self.norm = RMSNorm(width, config.rms_eps)
        self.head = Linear(width, config.patch * NUM_PARAMETERS, bias=True)
        self._rope = Rope(config.head_width, config.rope_theta, rotated=config.head_width // 2)

    def forward(self, batch: PatchBatch) -> ModelOutput:
        """Run the model on scaled patches; caches, if there are any, grow by them."""
        scaled_TP = batch.scaled_TP
        assert scaled_TP is not None, "rows are patches"
        batch = self.with_draw_keys(batch)
        x_TD = self.embed(scaled_TP.to(self.in_proj.weight.dtype))
        parts = parts_of(batch, self._rope.tables(batch.positions_T, x_TD.dtype))
        early = self.route_from_tokens(batch)
        output = self.run_layers(x_TD, lambda index: (batch, parts, early.get(index)))
        batch.advance_caches()
        return ModelOutput(self.norm(output.hidden_TD), output.routings)

    def embed(self, scaled_TP: Tensor) -> Tensor:
        """Return the rows of patches, ``[T, D]``."""
        features_TD: Tensor = self.feat_proj(F.silu(self.in_proj(scaled_TP)))
        residual_TD: Tensor = self.res_proj(scaled_TP)
        return features_TD + residual_TD

    def next_patch(self, hidden_TD: Tensor) -> Mixture:
        """Return the distributions of the points of the patch after each row, ``[T, P]``."""
        raw_TM: Tensor = self.head(hidden_TD)
        return mixture_of(raw_TM.unflatten(1, (self.config.patch, NUM_PARAMETERS)))

    def new_cache(self, max_length: int) -> SequenceCache:
        """Return an empty cache for one series."""
        layers = (layer for layer in self.layers if isinstance(layer, DecoderLayer))
        specs = [layer.self_attn.cache_spec() for layer in layers]
        return SequenceCache(specs, max_length, self.device)

    def score(self, values_BL: Tensor, observed_BL: Tensor) -> SeriesLoss:
        """Return the negative logarithm of the density of the series' scaled points, in nats.

        The first ``scaler_share`` of each series gives mean and deviation, and is not scored. Where
        it does not vary it says nothing about the scale: such a series is read at the scale of all
        its points, for its rows must be there, and nothing of it is scored.
        """
        patches = cut(values_BL, observed_BL, self.config.patch)
        seen_BNP, is_target_BNP = self.split_by_scaler(patches)
        scaled_BNP = patches.scaled(*scale_of(patches.values_BNP, seen_BNP))
        inputs_BN = patches.is_of_series_BN[:, :-1]
        ids_T = patch_ids(patches.values_BNP[:, :-1][inputs_BN])
        scaled_TP = scaled_BNP[:, :-1][inputs_BN]
        output = self(batch_of_patches(scaled_TP, ids_T, inputs_BN.sum(dim=1)))
        following = self.next_patch(output.hidden_TD)
        targets_TP = scaled_BNP[:, 1:][inputs_BN].to(following.loc_t.dtype)
        is_target_TP = is_target_BNP[:, 1:][inputs_BN]
        loss = -torch.where(is_target_TP, following.log_density(targets_TP), 0).sum()
        return SeriesLoss(loss, int(is_target_TP.sum()), output.routings)

    def split_by_scaler(self, patches: Patches) -> tuple[Tensor, Tensor]:
        """Return bool ``[B, N, P]``: the points that give mean and deviation, and the targets."""
        observed_BNP = patches.observed_BNP
        of_scaler_BNP = observed_BNP & self.read_by_scaler(patches).unsqueeze(2)
        varies_B11 = varies(patches.values_BNP, of_scaler_BNP)[:, None, None]
        return (
            torch.where(varies_B11, of_scaler_BNP, observed_BNP),
            observed_BNP & ~of_scaler_BNP & varies_B11,
        )

    def read_by_scaler(self, patches: Patches) -> Tensor:
        """Return bool ``[B, N]``: the patches that give mean and deviation in training."""
        lengths_B = patches.is_of_series_BN.sum(dim=1)
        share_B = lengths_B.double() * self.config.scaler_share
        count_B = (share_B - ROUNDING).ceil().clamp(min=1)
        return patches.is_of_series_BN & (patches.positions_BN < count_B.unsqueeze(1))

    def rows_of_window(self, length: int) -> int:
        """Return the rows that :meth:`score` computes for a window of ``length`` points."""
        return -(-length // self.config.patch) - 1

    def num_targets(self, values_BL: Tensor, observed_BL: Tensor) -> int:
        """Return the observed points after the patches that only the scaler reads."""
        _, is_target_BNP = self.split_by_scaler(cut(values_BL, observed_BL, self.config.patch))
        return int(is_target_BNP.sum())

    @torch.no_grad()
    def predict(
        self,
        values_BL: Tensor,
        observed_BL: Tensor,
        horizon: int,
        quantiles: Sequence[float] = (),
        seed: int = 0,
    ) -> SeriesForecast:
        """Return mean and quantiles of ``num_samples`` futures of each series.

        A future is drawn patch by patch, and each drawn patch is context for the next one. Mean and
        deviation are those of the observed points, for all patches of the forecast. (The released
        code takes them again with each drawn patch, so that it can keep no keys and values.) Of a
        series that is too long only the last patches are read that leave room for the forecast.

        Raises :class:`ConfigError` for a horizon or a quantile that is not there, and for a series
        without an observed point.
        """
        config = self.config
        check_request(horizon, quantiles, observed_BL, (config.most_patches - 1) * config.patch)
        num_ahead = -(-horizon // config.patch)
        longest = (config.most_patches - num_ahead) * config.patch
        patches = cut(values_BL[:, -longest:], observed_BL[:, -longest:], config.patch)
        loc_B, scale_B = scale_of(patches.values_BNP, patches.observed_BNP)
        futures_BSH = self.futures(patches, loc_B, scale_B, num_ahead, seed).flatten(2)
        futures_BSH = futures_BSH[:, :, :horizon].double()
        futures_BSH = loc_B[:, None, None] + scale_B[:, None, None] * futures_BSH
        return SeriesForecast(*mean_and_quantiles(futures_BSH, quantiles))

    def futures(
        self, patches: Patches, loc_B: Tensor, scale_B: Tensor, num_ahead: int, seed: int
    ) -> Tensor:
        """Draw the next ``num_ahead`` patches of each series, scaled: ``[B, S, J, P]``.

        All series go through the same number of forwards together, because other ranks may wait
        for the experts of this one. Futures come in groups, because each has its own cache.
        """
        config, of_series_BN = self.config, patches.is_of_series_BN
        lengths_B = of_series_BN.sum(dim=1)
        lengths = lengths_B.tolist()
        ids_T = patch_ids(patches.values_BNP[of_series_BN])
        shape = (num_ahead, NUM_UNIFORMS, config.num_samples, config.patch)
        points_BJ3SP = uniforms_of(seed, ids_T.split(lengths), shape)
        points_J3BSP = points_BJ3SP.permute(1, 2, 0, 3, 4).to(self.device)
        caches = [self.new_cache(length + num_ahead - 1) for length in lengths]
        scaled_TP = patches.scaled(loc_B, scale_B)[of_series_BN]
        hidden_TD = self(batch_after(caches, scaled_TP, ids_T, lengths)).hidden_TD
        hidden_BD = hidden_TD[lengths_B.cumsum(0) - 1]
        groups = [
            self._drawn(hidden_BD, points_J3BgP, caches)
            for points_J3BgP in points_J3BSP.split(FUTURES_TOGETHER, dim=3)
        ]
        return torch.cat(groups, dim=1)

    def _drawn(
        self, hidden_BD: Tensor, points_J3BSP: Tensor, caches: Sequence[SequenceCache]
    ) -> Tensor:
        """Draw a group of futures from the last row of each series, ``[B, S, J, P]``."""
        num_futures = points_J3BSP.shape[3]
        own = [cache.copy() for cache in caches for _ in range(num_futures)]
        hidden_TD = hidden_BD.repeat_interleave(num_futures, dim=0)
        drawn: list[Tensor] = []
        for points_3BSP in points_J3BSP:
            if drawn:
                batch = batch_after(own, drawn[-1], patch_ids(drawn[-1]), [1] * len(own))
                hidden_TD = self(batch).hidden_TD
            drawn.append(self.next_patch(hidden_TD).samples(points_3BSP.flatten(1, 2)))
        return torch.stack(drawn, dim=1).unflatten(0, (len(caches), num_futures))
