"""Time models of communication and of experts: seconds as a line in the size.

FSMoE (Pan et al., ASPLOS 2025, section 4): ``t(n) = alpha + beta n``, fitted by least squares to a
few measured sizes of each operation.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError

Operation = Literal[
    "dispatch", "gather", "experts", "experts_backward", "scatter", "combine", "gradients"
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

Sample = tuple[float, float]
"""A size (above 0) and the seconds it took (above 0)."""

MIN_SIZES_TO_JUDGE = 4
"""With fewer sizes no point can be told from the line that the others make."""
FAR = 3 * 1.4826
"""Medians of the relative distances to the line beyond which a point is an outlier. 1.4826 of them
are a standard deviation of normal noise."""
NOISE = 0.1
"""A point closer than this to the line, as a share of its seconds, is no outlier."""


@dataclass(frozen=True, slots=True)
class Linear:
    """``seconds(n) = alpha + beta n`` for n > 0."""

    alpha: float
    """Seconds of an operation of the smallest size."""
    beta: float
    """Seconds for each further byte or row."""
    r2: float = 1.0
    """Share of the variance of the samples that the line explains; 1 is a perfect fit."""
    outliers: int = 0
    """Measured sizes that the fit left out."""

    def seconds(self, size: float) -> float:
        """Return the predicted seconds; an operation of size 0 does not happen and takes none."""
        return self.alpha + self.beta * size if size > 0 else 0.0

    def size(self, seconds: float) -> float:
        """Return the largest size that takes no more than ``seconds``; 0 if none does."""
        if seconds < self.alpha:
            return 0.0
        return (seconds - self.alpha) / self.beta if self.beta > 0 else math.inf

    def scaled(self, factor: float) -> "Linear":
        """Return the line of an operation that takes ``factor`` times as long."""
        return Linear(factor * self.alpha, factor * self.beta, self.r2, self.outliers)


FREE = Linear(0.0, 0.0)
"""An operation that does not happen: the links inside a node where there is one level only."""


def fit(samples: Iterable[Sample]) -> Linear:
    """Return the line through samples of two or more sizes, with ``alpha, beta >= 0``.

    Repeats of a size count as their median. Sizes far from a robust line (Theil and Sen: the median
    of all slopes) are left out. The rest is fitted by least squares of relative errors: noise
    grows with the time, and a choice of degrees needs small sizes as much as large ones. ``r2`` is
    that of the sizes that were kept.
    """
    repeats: dict[float, list[float]] = {}
    for size, seconds in samples:
        assert size > 0 and seconds > 0, "a sample has a size and takes time"
        repeats.setdefault(size, []).append(seconds)
    assert len(repeats) >= 2, "a line needs two sizes"
    sizes = np.array(sorted(repeats))
    times = np.array([median(repeats[size]) for size in sizes])
    kept = _near_the_line(sizes, times)
    alpha, beta = _least_squares(sizes[kept], times[kept])
    r2 = _explained(times[kept], alpha + beta * sizes[kept])
    return Linear(alpha, beta, r2, int(len(sizes) - kept.sum()))


def _near_the_line(
    sizes: npt.NDArray[np.float64], times: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    if len(sizes) < MIN_SIZES_TO_JUDGE:
        return np.ones(len(sizes), dtype=bool)
    first, second = np.triu_indices(len(sizes), k=1)
    slope = np.median((times[second] - times[first]) / (sizes[second] - sizes[first]))
    rest = times - slope * sizes
    shares = np.abs(rest - np.median(rest)) / times
    kept: npt.NDArray[np.bool_] = shares <= max(FAR * float(np.median(shares)), NOISE)
    return kept


def _least_squares(
    sizes: npt.NDArray[np.float64], times: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Minimise ``sum ((alpha + beta n) / t - 1)^2`` over ``alpha, beta >= 0``."""
    ones, slopes = 1 / times, sizes / times
    # Normal equations of two unknowns, by Cramer's rule.
    aa, ab, bb = ones @ ones, ones @ slopes, slopes @ slopes
    determinant = aa * bb - ab * ab
    alpha = (ones.sum() * bb - slopes.sum() * ab) / determinant
    beta = (slopes.sum() * aa - ones.sum() * ab) / determinant
    if alpha < 0:
        return 0.0, float(slopes.sum() / bb)
    if beta < 0:
        return float(ones.sum() / aa), 0.0
    return float(alpha), float(beta)


def _explained(times: npt.NDArray[np.float64], line: npt.NDArray[np.float64]) -> float:
    variance = float(((times - times.mean()) ** 2).sum())
    left = float(((times - line) ** 2).sum())
    return 1 - left / variance if variance > 0 else 1.0


@dataclass(frozen=True, slots=True)
class CostModel:
    """What one rank pays for each operation of an MoE layer.

    Sizes of links are bytes of the larger buffer on a rank: what it dispatches and gets back, has
    after a gather, puts into a scatter, or sums. Sizes of experts are routed rows.
    """

    dispatch: Linear
    """Rows to their experts over the link between nodes: all-to-all."""
    gather: Linear
    """Rows over the links inside a node, before the experts: all-gather or all-to-all."""
    experts: Linear
    """Forward of the experts here."""
    experts_backward: Linear
    """Their backward; about twice the forward."""
    scatter: Linear
    """Results over the links inside a node: reduce-scatter or all-to-all."""
    combine: Linear
    """Results over the link between nodes: all-to-all."""
    gradients: Linear
    """The all-reduce of dense gradients."""
    contention: float = 0.0
    """How much longer experts and links take while both work; see
    :func:`~moeyard.parallel.planning.schedule.simulate`. On a CPU, messages take cores."""

    @classmethod
    def fitted(cls, samples: Mapping[Operation, Iterable[Sample]]) -> "CostModel":
        """Return the model of measured samples; operations without any are free."""
        lines = {name: fit(samples[name]) if name in samples else FREE for name in OPERATIONS}
        return cls(**lines, contention=0.0)

    def to_json(self) -> str:
        """Return the model as text that :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CostModel":
        """Return the model in ``text``; raise :class:`ConfigError` if it is not one."""
        try:
            values = json.loads(text)
            lines = {name: Linear(**values[name]) for name in OPERATIONS}
            return cls(**lines, contention=float(values["contention"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"the cost model is {text[:40]!r}..., which cannot be read "
                f"({type(error).__name__}: {error}); measure it again."
            ) from None
