"""Moirai-MoE: a decoder of patches of series, with a distribution for each point of the next patch.

Liu et al. 2024, "Moirai-MoE: Empowering Time Series Foundation Models with Sparse Mixture of
Experts". Each variate is a series by itself: the attention bias between variates is left out.

B series, L points, N patches of a series, P points of a patch, T rows, D model width, S futures of
J patches, H points of a forecast, Q quantiles, M numbers that a patch's distributions are made of.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention.parts import parts_of
from ..attention.rope import Rope
from ..batch import Batch, batch_of
from ..blocks.block import State
from ..config.moirai import MoiraiConfig
from ..kv_cache import SequenceCache
from ..linear import Linear
from ..norm import RMSNorm
from .decoder_layer import DecoderLayer
from .futures import check_request, generator_for, mean_and_quantiles, uniforms
from .mixture import NUM_PARAMETERS, NUM_UNIFORMS, Mixture, mixture_of
from .model import ModelOutput
from .options import WHOLE, ModelOptions
from .patches import Patches, batch_of_patches, content_keys, cut, scale_of
from .routed import LayerOutput
from .series_model import SeriesForecast, SeriesLoss, SeriesModel


def moirai_layer(config: MoiraiConfig, layer: int, options: ModelOptions = WHOLE) -> DecoderLayer:
    """Return the layer at index ``layer``: that of a decoder."""
    return DecoderLayer(config.decoder, layer, options)


class Moirai(SeriesModel):
    """Patches in, a distribution of the next patch's points out."""

    config: MoiraiConfig

    def __init__(self, config: MoiraiConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__()
        assert options.stage in (None, range(config.num_layers)), "series are not split in stages"
        self.config = config
        self.stage = range(config.num_layers)
        self.recompute = options.recompute is True
        width = config.d_model
        self.in_proj = Linear(config.patch, width, bias=True)
        self.feat_proj = Linear(width, width, bias=True)
        self.res_proj = Linear(config.patch, width, bias=True)
        self.layers = nn.ModuleList(moirai_layer(config, layer, options) for layer in self.stage)
        self.norm = RMSNorm(width, config.rms_eps)
        self.head = Linear(width, config.patch * NUM_PARAMETERS, bias=True)
        self._rope = Rope(config.head_width, config.rope_theta, rotated=config.head_width // 2)

    def forward(self, scaled_TP: Tensor, batch: Batch) -> ModelOutput:
        """Run the model on scaled patches, which are the rows of ``batch``; its caches grow."""
        x_TD = self.embed(scaled_TP.to(self.in_proj.weight.dtype))
        parts = parts_of(batch, self._rope.tables(batch.positions_T, x_TD.dtype))
        early = self.route_from_tokens(batch)
        state: State = ()
        routings = []
        for index, layer in enumerate(self.layers):
            arguments = (x_TD, state, batch, parts, early.get(index), None)
            if self.recompute and self.training:
                output: LayerOutput = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                output = layer(*arguments)
            x_TD, state = output.x_TD, output.state
            if output.routing is not None:
                routings.append(output.routing)
        batch.advance_caches()
        return ModelOutput(self.norm(x_TD), routings)

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
        specs = [layer.self_attn.cache_spec() for layer in self.layers]
        return SequenceCache(specs, max_length, self.device)

    def score(self, values_BL: Tensor, observed_BL: Tensor) -> SeriesLoss:
        """Return the negative logarithm of the density of the series' scaled points, in nats.

        The first ``scaler_share`` of each series gives mean and deviation, and is not scored.
        """
        patches = cut(values_BL, observed_BL, self.config.patch)
        of_scaler_BN = self.read_by_scaler(patches)
        seen_BNP = patches.observed_BNP & of_scaler_BN.unsqueeze(2)
        scaled_BNP = patches.scaled(*scale_of(patches.values_BNP, seen_BNP))
        inputs_BN = patches.is_of_series_BN[:, :-1]
        batch = batch_of_patches(inputs_BN.sum(dim=1))
        if self.training and any(router.config.draws() for router in self.routers()):
            content_TP = patches.values_BNP[:, :-1][inputs_BN]
            batch = replace(batch, draw_keys=content_keys(content_TP, batch.lengths))
        output = self(scaled_BNP[:, :-1][inputs_BN], batch)
        following = self.next_patch(output.hidden_TD)
        targets_TP = scaled_BNP[:, 1:][inputs_BN].to(following.loc_t.dtype)
        is_target_BNP = patches.observed_BNP & ~of_scaler_BN.unsqueeze(2)
        is_target_TP = is_target_BNP[:, 1:][inputs_BN]
        loss = -torch.where(is_target_TP, following.log_density(targets_TP), 0).sum()
        return SeriesLoss(loss, int(is_target_TP.sum()), output.routings)

    def read_by_scaler(self, patches: Patches) -> Tensor:
        """Return bool ``[B, N]``: the patches that give mean and deviation in training."""
        lengths_B = patches.is_of_series_BN.sum(dim=1)
        count_B = (lengths_B * self.config.scaler_share).ceil().clamp(min=1)
        return patches.is_of_series_BN & (patches.positions_BN < count_B.unsqueeze(1))

    def num_targets(self, observed_BL: Tensor) -> int:
        """Return the observed points after the patches that only the scaler reads."""
        patches = cut(observed_BL, observed_BL, self.config.patch)
        return int((patches.observed_BNP & ~self.read_by_scaler(patches).unsqueeze(2)).sum())

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
        check_request(horizon, quantiles, observed_BL, (config.max_positions - 1) * config.patch)
        num_ahead = -(-horizon // config.patch)
        longest = (config.max_positions - num_ahead + 1) * config.patch
        patches = cut(values_BL[:, -longest:], observed_BL[:, -longest:], config.patch)
        loc_B, scale_B = scale_of(patches.values_BNP, patches.observed_BNP)
        scaled_BNP = patches.scaled(loc_B, scale_B)
        means = [values_BL.new_empty(0, horizon, dtype=torch.float32)]
        levels = [means[0].new_empty(0, horizon, len(quantiles))]
        # One by one, so that the bits of a forecast do not depend on the other series.
        for index, is_of_series_N in enumerate(patches.is_of_series_BN):
            values_NP = patches.values_BNP[index][is_of_series_N]
            (key,) = content_keys(values_NP, (len(values_NP),))
            generator = generator_for(seed, key)
            futures_SJP = self.futures(scaled_BNP[index][is_of_series_N], num_ahead, generator)
            futures_SH = futures_SJP.flatten(1)[:, :horizon].double()
            futures_SH = loc_B[index] + scale_B[index] * futures_SH
            mean_H, levels_HQ = mean_and_quantiles(futures_SH, quantiles)
            means.append(mean_H.unsqueeze(0))
            levels.append(levels_HQ.unsqueeze(0))
        return SeriesForecast(torch.cat(means), torch.cat(levels))

    @torch.no_grad()
    def futures(self, scaled_NP: Tensor, num_ahead: int, generator: torch.Generator) -> Tensor:
        """Draw the next ``num_ahead`` patches of a scaled series, ``[S, J, P]``."""
        num_samples, num_rows = self.config.num_samples, len(scaled_NP)
        shape = (NUM_UNIFORMS, num_samples, self.config.patch)
        ids_N = torch.zeros(num_rows, dtype=torch.int64, device=scaled_NP.device)
        cache = self.new_cache(num_rows + num_ahead - 1)
        hidden_TD = self(scaled_NP, batch_of([ids_N], [cache])).hidden_TD[-1:]
        caches: list[SequenceCache] = []
        drawn: list[Tensor] = []
        for step in range(num_ahead):
            if step == 1:
                caches = [cache.copy() for _ in range(num_samples)]
            if step:
                batch = batch_of([ids_N[:1]] * num_samples, caches)
                hidden_TD = self(drawn[-1], batch).hidden_TD
            points = uniforms(shape, generator, self.device)
            drawn.append(self.next_patch(hidden_TD).samples(points))
        return torch.stack(drawn, dim=1)
