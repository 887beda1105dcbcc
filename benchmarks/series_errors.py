"""Errors of forecasts in the last four of twenty months of hourly series.

B windows, L points of a window, H points ahead, Q quantiles, N lines and C columns of a table.
"""

from pathlib import Path

import numpy as np
import torch

from moeyard.moe.models.series_model import SeriesModel

MONTH = 30 * 24
PARTS = (12 * MONTH, 4 * MONTH, 4 * MONTH)
"""Lines for training, validation and test, as in the published splits."""
CONTEXT, HORIZON = 512, 96
WINDOWS = 16
"""Test windows of each column, spread evenly."""
LEVELS = tuple(level / 10 for level in range(1, 10))


def windows(data: Path) -> torch.Tensor:
    """Return test windows of each column, in units of the training months."""
    table_NC = np.genfromtxt(data, delimiter=",", skip_header=1)[: sum(PARTS), 1:]
    known_NC = table_NC[: PARTS[0]]
    table_NC = (table_NC - known_NC.mean(axis=0)) / known_NC.std(axis=0)
    first, last = PARTS[0] + PARTS[1] - CONTEXT, sum(PARTS) - CONTEXT - HORIZON
    starts = np.linspace(first, last, WINDOWS).round().astype(int)
    cut = [table_NC[start : start + CONTEXT + HORIZON].T for start in starts]
    return torch.from_numpy(np.concatenate(cut)).float()


@torch.no_grad()
def measure(model: SeriesModel, windows_BL: torch.Tensor) -> dict[str, float]:
    """Return errors of forecasts, and the loss on the whole windows."""
    observed_BL = torch.ones_like(windows_BL, dtype=torch.bool)
    scored = model.score(windows_BL, observed_BL)
    known_BL, ahead_BH = windows_BL[:, :CONTEXT], windows_BL[:, CONTEXT:]
    parts = [
        model.predict(part, torch.ones_like(part, dtype=torch.bool), HORIZON, LEVELS)
        for part in known_BL.split(16)
    ]
    mean_BH = torch.cat([part.mean_BH for part in parts])
    levels_BHQ = torch.cat([part.quantiles_BHQ for part in parts])
    above_BHQ = ahead_BH.unsqueeze(2) - levels_BHQ
    share_Q = torch.tensor(LEVELS)
    pinball_BHQ = torch.maximum(share_Q * above_BHQ, (share_Q - 1) * above_BHQ)
    return {
        "wql": float(2 * pinball_BHQ.mean() / ahead_BH.abs().mean()),
        "mse": float((mean_BH - ahead_BH).square().mean()),
        "mae": float((mean_BH - ahead_BH).abs().mean()),
        "nll": float(scored.loss_sum / scored.num_targets),
        "inside_80": float(
            ((ahead_BH >= levels_BHQ[..., 0]) & (ahead_BH <= levels_BHQ[..., -1])).float().mean()
        ),
    }
