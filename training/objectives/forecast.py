"""The loss of a model of series on windows, and the errors of its forecasts.

B windows, L points of each, H points ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ...moe.models.series_model import SeriesModel
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.series import SeriesData, build_series_data
from ..data.series_windows import SeriesWindows
from ..formats.series import SeriesConfig
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss, Objective


@dataclass(slots=True)
class ScoredWindows(MicroBatchLoss):
    """The result of one micro-batch, with the errors of its forecasts."""

    errors_3: Tensor
    """fp64: squared and absolute errors, summed over the forecast points that were observed, and
    how many these are. Zeros in training."""


class ForecastLoss(nn.Module):
    """The loss of windows; for held-out windows also a forecast of their last points."""

    def __init__(self, model: SeriesModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: SeriesWindows) -> ScoredWindows:
        """Score windows, and forecast if they have a horizon."""
        here = self.model.device
        values_BL = to_device(windows.values_BL, here)
        observed_BL = to_device(windows.observed_BL, here)
        scored = self.model.score(values_BL, observed_BL)
        errors_3 = torch.zeros(3, dtype=torch.float64)
        if windows.horizon:
            seen = slice(None, -windows.horizon)
            forecast = self.model.predict(values_BL[:, seen], observed_BL[:, seen], windows.horizon)
            errors_3 = _errors(
                forecast.mean_BH.cpu(),
                windows.values_BL[:, -windows.horizon :].cpu(),
                windows.observed_BL[:, -windows.horizon :].cpu(),
            )
        return ScoredWindows(scored.loss_sum, scored.num_targets, scored.routings, errors_3)


class ForecastObjective(Objective[SeriesModel]):
    """Windows of series are scored by the model's own loss; held-out ones are also forecast."""

    model_kinds = ("time_moe", "moirai")
    data: SeriesData

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> SeriesData:
        """Read the series and standardise them."""
        return build_series_data(config, folder, mesh, stop)

    def module(self, decoder: SeriesModel) -> nn.Module:
        """Return :class:`ForecastLoss`.

        Raises :class:`ConfigError` for a horizon beyond the model, and for windows too short to
        learn from.
        """
        data, length = self.config.data, self.config.train.sequence_length
        assert isinstance(data, SeriesConfig), "an objective on series has series"
        context = data.context or length
        if context + data.horizon > decoder.most_points:
            raise ConfigError(
                f"data.horizon is {data.horizon} after a context of {context} points, but the "
                f"model takes {decoder.most_points} points; lower it, or raise "
                "model.max_positions."
            )
        if not _has_targets(decoder, length):
            raise ConfigError(
                f"train.sequence_length is {length}, but windows of so few points have none that "
                f"a model of kind {decoder.config.kind} learns to forecast; raise it."
            )
        if not _has_targets(decoder, context + data.horizon):
            raise ConfigError(
                f"data.horizon is {data.horizon} after a context of {context} points, but held-out "
                f"windows of so few points have none that a model of kind {decoder.config.kind} "
                "is scored on; raise data.context."
            )
        self._model = decoder
        return ForecastLoss(decoder)

    def batch(self, step: int, rows: range, device: torch.device) -> SeriesWindows:
        """Return some windows of the global batch, on the host."""
        return self.data.train.rows(self.data.train.at(step, rows))

    def window_rows(self, step: int, rows: range) -> list[int]:
        """Return the model's rows for each window."""
        return [self._model.rows_of_window(self.config.train.sequence_length)] * len(rows)

    def divisor(self, step: int) -> int:
        """Return the model's targets in the global batch."""
        train = self.data.train
        windows = train.rows(train.at(step, range(self.config.train.batch_sequences)))
        return max(1, self._model.num_targets(windows.values_BL, windows.observed_BL))

    def num_tokens(self, steps: range) -> int:
        """Return the model's rows for the global batches."""
        rows = self._model.rows_of_window(self.config.train.sequence_length)
        return len(steps) * self.config.train.batch_sequences * rows

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score and forecast ``eval_sequences`` held-out windows, split over the ranks."""
        held_out = self.data.held_out
        errors_3 = torch.zeros(3, dtype=torch.float64)

        def part_of(windows: Sequence[int]) -> MicroBatchLoss:
            part: ScoredWindows = module(held_out.rows(list(windows)))
            errors_3.add_(part.errors_3)
            return part

        loss, num_targets = self.score(part_of, module, len(held_out), mesh)
        squared, absolute, count = mesh.sum(errors_3).tolist()
        metrics = {"eval_mse": squared / count, "eval_mae": absolute / count}
        if num_targets:  # by chance none of the chosen windows has one
            metrics["eval_loss"] = loss
        return HeldOut(metrics, num_targets)


def _has_targets(model: SeriesModel, length: int) -> bool:
    """Return whether a window of so many points, all observed and different, has a target."""
    values_1L = torch.arange(length, dtype=torch.float32).unsqueeze(0)
    return model.num_targets(values_1L, torch.ones_like(values_1L, dtype=torch.bool)) > 0


def _errors(found_BH: Tensor, wanted_BH: Tensor, observed_BH: Tensor) -> Tensor:
    """Return squared errors, absolute errors and their number, summed over observed points."""
    errors_N = (found_BH - wanted_BH)[observed_BH].double()
    count = torch.tensor(float(len(errors_N)), dtype=torch.float64)
    return torch.stack([errors_N.square().sum(), errors_N.abs().sum(), count])
