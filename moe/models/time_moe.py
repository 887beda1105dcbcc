"""Time-MoE: a decoder that reads series point by point and has a head for each horizon.

B series, L points of each, T rows, D model width, H points ahead.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ..attention.parts import parts_of
from ..attention.rope import Rope
from ..config.time_moe import TimeMoeConfig
from ..kv_cache import SequenceCache
from ..linear import Linear
from ..norm import RMSNorm
from .decoder_layer import DecoderLayer
from .model import ModelOutput
from .options import WHOLE, ModelOptions
from .series_batch import SeriesBatch, batch_of_series, has_row, next_points
from .series_model import SeriesForecast, SeriesLoss, SeriesModel
from .windowed_loss import huber_by_window


class PointEmbedding(nn.Module):
    """``silu(gate x) * (value x)`` of each point x."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.value_proj = Linear(1, d_model)
        self.gate_proj = Linear(1, d_model)

    def forward(self, values_T: Tensor) -> Tensor:
        """Return the embedded points, ``[T, D]``."""
        x_T1 = values_T.to(self.value_proj.weight.dtype).unsqueeze(1)
        embedded_TD: Tensor = F.silu(self.gate_proj(x_T1)) * self.value_proj(x_T1)
        return embedded_TD


class HorizonHead(nn.Module):
    """The next points of each row, all at once."""

    def __init__(self, d_model: int, horizon: int) -> None:
        super().__init__()
        self.out_layer = Linear(d_model, horizon)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return the next points, ``[T, H]``, at least in fp32."""
        points_TH: Tensor = self.out_layer(hidden_TD)
        return points_TH.to(torch.promote_types(points_TH.dtype, torch.float32))


class TimeMoe(SeriesModel):
    """Time-MoE (Shi et al. 2024): each point of a series is a row of a decoder.

    The layers are those of :class:`.Decoder`, with its attention, caches and experts. Every row
    predicts the points after it, with each head. Values are read as they are: scale them first.

    Points before the first observed one have no row. Later ones that were not observed are read as
    the last observed one, and are no targets.
    """

    config: TimeMoeConfig

    def __init__(self, config: TimeMoeConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__(config, options)
        decoder = config.decoder()
        self.embedding = PointEmbedding(config.d_model)
        layers = (DecoderLayer(decoder, index, options) for index in range(config.num_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.d_model, config.rms_eps)
        heads = (HorizonHead(config.d_model, horizon) for horizon in config.horizons)
        self.lm_heads = nn.ModuleList(heads)
        self._rope = Rope.of(decoder)

    def forward(self, batch: SeriesBatch) -> ModelOutput:
        """Run the layers on points; caches, if any, grow by them. Heads read the result's rows."""
        assert batch.values_T is not None, "a batch of series has values"
        batch = self.with_draw_keys(batch)
        x_TD = self.embedding(batch.values_T)
        parts = parts_of(batch, self._rope.tables(batch.positions_T, x_TD.dtype))
        output = self.run_layers(x_TD, lambda _: (batch, parts))
        batch.advance_caches()
        return ModelOutput(self.norm(output.hidden_TD), output.routings)

    def new_cache(self, max_length: int) -> SequenceCache:
        """Return an empty cache for one series of at most ``max_length`` points."""
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        specs = [layer.self_attn.cache_spec() for layer in layers]
        return SequenceCache(specs, max_length, self.device)

    def score(self, values_BL: Tensor, observed_BL: Tensor) -> SeriesLoss:
        """Return the sum over windows of each window's loss: the mean over heads of the Huber loss.

        A head's loss is the mean over all rows of the window and the observed points that the row
        predicts inside the window. A target of the loss is a window.
        """
        inputs_BL, seen_BL = values_BL[:, :-1], observed_BL[:, :-1]
        output: ModelOutput = self(batch_of_series(inputs_BL, seen_BL))
        is_row_BL, delta = has_row(seen_BL), self.config.huber_delta
        total = output.hidden_TD.new_zeros((), dtype=torch.float32)
        for head in self.lm_heads:
            points_TH = head(output.hidden_TD)
            loss_B = huber_by_window(points_TH, is_row_BL, values_BL, observed_BL, delta)
            total = total + loss_B.sum() / len(self.lm_heads)
        return SeriesLoss(total, self.num_targets(values_BL, observed_BL), output.routings)

    def num_targets(self, values_BL: Tensor, observed_BL: Tensor) -> int:
        """Return the windows in which a point is predicted: they have two observed ones."""
        return int((observed_BL.sum(dim=1) > 1).sum())

    @torch.no_grad()
    def predict(
        self,
        values_BL: Tensor,
        observed_BL: Tensor,
        horizon: int,
        quantiles: Sequence[float] = (),
        seed: int = 0,
    ) -> SeriesForecast:
        """Return the next points of each series; ``quantiles_BHQ`` is None, whatever is asked for.

        The largest head that does not reach beyond the horizon predicts, or else the smallest one.
        Its points become the context of the next prediction, with the keys and values of all
        earlier ones. The model forecasts points, so nothing is drawn. Raises :class:`ConfigError`
        for a horizon that the model does not reach, and for a series without an observed point.
        """
        self._check(observed_BL, horizon)
        length = values_BL.shape[1] + horizon
        caches = [self.new_cache(length) for _ in values_BL]
        batch = batch_of_series(values_BL, observed_BL, caches or None)
        found, remaining = [], horizon
        while True:
            output: ModelOutput = self(batch)
            ends_B = torch.tensor(batch.lengths, dtype=torch.int64).cumsum(0) - 1
            points_BH = self._head(remaining)(output.hidden_TD[ends_B.to(self.device)])
            found.append(points_BH)
            remaining -= points_BH.shape[1]
            if remaining <= 0:
                return SeriesForecast(torch.cat(found, dim=1)[:, :horizon].float(), None)
            batch = next_points(points_BH, caches)

    def _head(self, remaining: int) -> nn.Module:
        """Return the largest head that does not reach beyond ``remaining`` points, if any."""
        fitting = [index for index, h in enumerate(self.config.horizons) if h <= remaining]
        return self.lm_heads[max(fitting, default=0)]

    def _check(self, observed_BL: Tensor, horizon: int) -> None:
        length = observed_BL.shape[1]
        if length < 1 or horizon < 1 or length + horizon > self.most_points:
            raise ConfigError(
                f"the context has {length} points and horizon is {horizon}, but the model takes 1 "
                f"or more of each and {self.most_points} together; shorten one of them."
            )
        empty = (~observed_BL.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(
                f"series {empty[0]} has no observed point; give at least one, or leave it out."
            )
