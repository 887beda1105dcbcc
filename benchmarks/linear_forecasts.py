"""Linear forecasters in closed form, and the windows on which forecasters are compared.

A forecaster maps a context of L points to the H that follow, with one matrix for all channels.
``linear`` is that matrix and a constant. ``last`` subtracts the last point of the context, and adds
it afterwards. ``split`` has one matrix for the moving average of the context and one for the rest,
each with a ridge penalty, as DLinear (Zeng et al. 2023) has one for each.

All three are linear in the window, so a fit needs only the sums of products of windows. The penalty
and L are chosen on the validation months.

N windows, C channels, L points of context, H points ahead, P penalties.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

MONTH = 30 * 24
"""Hours, as in the published splits."""
SPLITS = {"train": (0, 12), "validation": (12, 16), "test": (16, 20)}
"""In months."""
HORIZONS = (96, 192, 336, 720)
LOOK_BACKS = (96, 336, 512)
KERNEL = 25
"""Points of DLinear's moving average."""
PENALTIES = (1e-2, 1e1, 1e2, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5)
"""The windows' sums have about 50,000 terms."""
KINDS = ("linear", "last", "split")


def read_hourly(path: Path) -> np.ndarray:
    """Return the table's numbers ``[T, C]``; the first column has dates."""
    return np.genfromtxt(path, delimiter=",", skip_header=1)[:, 1:]


def standardised(values_TC: np.ndarray) -> np.ndarray:
    """Return the values in units of the training months' mean and deviation, of each channel."""
    train = values_TC[: SPLITS["train"][1] * MONTH]
    return (values_TC - train.mean(axis=0)) / train.std(axis=0)


def windows(values_TC: np.ndarray, split: str, context: int, horizon: int) -> np.ndarray:
    """Return all windows ``[N, C, context + horizon]`` whose horizon lies in a split.

    A context of the later splits reaches back into the months before, as in the published ones.
    """
    first, end = (month * MONTH for month in SPLITS[split])
    first = max(0, first - context)
    return sliding_window_view(values_TC[first:end], context + horizon, axis=0)


def products(values_TC: np.ndarray, split: str, context: int, horizon: int) -> np.ndarray:
    """Return the sum of w w' over windows and channels; w is a window, and a 1 at its end."""
    found_NCW = windows(values_TC, split, context, horizon)
    size = context + horizon + 1
    total = np.zeros((size, size))
    for channel in range(found_NCW.shape[1]):
        w_NW = np.ones((len(found_NCW), size))
        w_NW[:, :-1] = found_NCW[:, channel]
        total += w_NW.T @ w_NW
    return total


def features(kind: str, context: int) -> np.ndarray:
    """Return the matrix that makes a kind's inputs of a context and a 1; the last one is the 1."""
    own = np.eye(context + 1)
    if kind == "last":
        own[:-1, -2] -= 1
        return np.delete(own, context - 1, axis=0)  # the last point itself has become 0
    if kind == "split":
        trend = np.zeros((context, context + 1))
        for place in range(context):
            for step in range(-(KERNEL // 2), KERNEL // 2 + 1):
                trend[place, min(max(place + step, 0), context - 1)] += 1 / KERNEL
        return np.concatenate((own[:-1] - trend, trend, own[-1:]))
    return own


def offsets(kind: str, context: int, horizon: int) -> np.ndarray:
    """Return what is added to a forecast, ``[H, context + 1]``: the last point, or nothing."""
    found = np.zeros((horizon, context + 1))
    if kind == "last":
        found[:, context - 1] = 1
    return found


@dataclass(frozen=True)
class Fitted:
    """A linear forecaster and how it was chosen."""

    kind: str
    context: int
    penalty: float
    validation_mse: float
    map_HL: np.ndarray
    """From a context and a 1 to the points ahead."""


def fit(values_TC: np.ndarray, kind: str, context: int, horizon: int, both: list) -> Fitted:
    """Return the forecaster with the best penalty; ``both`` are the products of two splits."""
    train, check = both
    own, added = features(kind, context), offsets(kind, context, horizon)
    is_input = np.r_[np.arange(context), context + horizon]
    is_ahead = np.arange(context, context + horizon)
    inputs = train[np.ix_(is_input, is_input)]
    cross = train[np.ix_(is_input, is_ahead)] - inputs @ added.T
    gram, cross = own @ inputs @ own.T, own @ cross
    best = None
    for penalty in PENALTIES:
        ridge = np.eye(len(gram)) * penalty
        ridge[-1, -1] = 0  # the constant is free
        map_HL = np.linalg.solve(gram + ridge, cross).T @ own + added
        loss = _squared(map_HL, check, is_input, is_ahead)
        if best is None or loss < best.validation_mse:
            best = Fitted(kind, context, penalty, loss, map_HL)
    assert best is not None
    return best


def _squared(map_HL: np.ndarray, sums: np.ndarray, inputs: np.ndarray, ahead: np.ndarray) -> float:
    """Return the mean squared error of a map on the windows with these products."""
    count = sums[-1, -1] * len(ahead)
    own = np.einsum("hl,lk,hk->", map_HL, sums[np.ix_(inputs, inputs)], map_HL, optimize=True)
    cross = np.sum(map_HL * sums[np.ix_(ahead, inputs)])
    return float((own - 2 * cross + np.trace(sums[np.ix_(ahead, ahead)])) / count)


def errors(
    values_TC: np.ndarray, fitted: Fitted, horizon: int, every: int = 1
) -> tuple[float, float]:
    """Return MSE and MAE over all channels and every so many test windows."""
    squared, absolute, count = 0.0, 0.0, 0
    found_NCW = windows(values_TC, "test", fitted.context, horizon)[::every]
    for channel in range(found_NCW.shape[1]):
        w_NW = found_NCW[:, channel]
        x_NL = w_NW[:, : fitted.context]
        ahead_NH = x_NL @ fitted.map_HL[:, :-1].T + fitted.map_HL[:, -1]
        apart_NH = ahead_NH - w_NW[:, fitted.context :]
        squared += float((apart_NH**2).sum())
        absolute += float(np.abs(apart_NH).sum())
        count += apart_NH.size
    return squared / count, absolute / count


def seasonal(context: int, horizon: int, period: int) -> Fitted:
    """Return the forecaster that repeats the last ``period`` points."""
    map_HL = np.zeros((horizon, context + 1))
    for step in range(horizon):
        map_HL[step, context - period + step % period] = 1
    return Fitted(f"repeat {period}", context, 0.0, float("nan"), map_HL)


def linear_rows(raw_TC: np.ndarray, horizon: int, every: int) -> dict[str, dict]:
    """Return the figures of each kind at its best look-back, and of repetitions.

    They are measured on every so many test windows, and on all.
    """
    values_TC = standardised(raw_TC)
    found: dict[str, Fitted] = {}
    for context in LOOK_BACKS:
        both = [products(values_TC, split, context, horizon) for split in ("train", "validation")]
        for kind in KINDS:
            fitted = fit(values_TC, kind, context, horizon, both)
            if kind not in found or fitted.validation_mse < found[kind].validation_mse:
                found[kind] = fitted
    for period in (1, 24):
        fitted = seasonal(96, horizon, period)
        found[fitted.kind] = fitted
    rows = {}
    for kind, fitted in found.items():
        mse, mae = errors(values_TC, fitted, horizon, every)
        mse_all, mae_all = errors(values_TC, fitted, horizon)
        rows[kind] = {
            "mse": mse,
            "mae": mae,
            "mse_all": mse_all,
            "mae_all": mae_all,
            "context": fitted.context,
            "penalty": fitted.penalty,
        }
    return rows
