"""The loss of forecasts from every row of a window.

B windows, L points of each, T rows, H points ahead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def huber_by_window(
    points_TH: Tensor, is_row_BL: Tensor, values_BL: Tensor, observed_BL: Tensor, delta: float
) -> Tensor:
    """Return the mean Huber loss of each window, ``[B]``; 0 for one without targets.

    ``points_TH`` are the next points that the rows predict. ``is_row_BL`` says which points of a
    window, all but its last, have a row. Points beyond the window or not observed do not count.
    """
    horizon = points_TH.shape[1]
    wanted_TH = _following(values_BL, horizon)[is_row_BL].to(points_TH.dtype)
    counts_TH = _following(observed_BL, horizon)[is_row_BL]
    loss_TH = F.huber_loss(points_TH, wanted_TH, reduction="none", delta=delta)
    loss_T = torch.where(counts_TH, loss_TH, torch.zeros_like(loss_TH)).sum(dim=1)
    window_T = is_row_BL.nonzero()[:, 0]
    sums_B = loss_T.new_zeros(len(is_row_BL)).index_add(0, window_T, loss_T)
    count_T = counts_TH.sum(dim=1)
    count_B = count_T.new_zeros(len(is_row_BL)).index_add(0, window_T, count_T)
    return sums_B / count_B.clamp(min=1)


def _following(x_BL: Tensor, horizon: int) -> Tensor:
    """Return the points after each but the last, ``[B, L - 1, H]``; 0 beyond the end."""
    return F.pad(x_BL[:, 1:], (0, horizon - 1)).unfold(1, horizon, 1)
