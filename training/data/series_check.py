"""Which series can be trained on and measured. N lines, C columns."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...moe.models.series_values import MOST_SCALED
from ..formats.series import SeriesConfig

Table = npt.NDArray[np.float64]


def check_parts(config: SeriesConfig, count: int, length: int) -> None:
    """Raise :class:`DataError` for parts that are too short.

    ``length`` is ``train.sequence_length``, and ``count`` the lines of the file.
    """
    train, part, end = config.parts(count)
    context = config.context or length
    if end > count:
        raise DataError(
            f"data.split asks for {end} lines, but {config.source!r} has {count}; lower it, or "
            "give shares."
        )
    if not 2 <= length <= len(train):
        raise DataError(
            f"train.sequence_length is {length}, but a window has 2 points or more and the "
            f"training part {len(train)} lines; change it, or data.split."
        )
    if config.horizon > len(part):
        raise DataError(
            f"data.horizon is {config.horizon}, but the {config.held_out} part has {len(part)} "
            "lines; lower it, or change data.split."
        )
    if context > part.start:
        name = "train.sequence_length" if config.context is None else "data.context"
        raise DataError(
            f"{name} is {context}, but the {config.held_out} part has {part.start} lines before "
            "it for contexts; lower it, or change data.split."
        )


def check_gaps(
    config: SeriesConfig, names: Sequence[str], values_NC: Table, lines_N: Sequence[int]
) -> None:
    """Raise :class:`DataError` for a column with more points missing in a row than ``max_gap``.

    ``lines_N`` are the points' lines in the file, from 1.
    """
    for name, values_N in zip(names, values_NC.T, strict=True):
        # The first point of each gap, and the point after its last one.
        is_gap_N = np.concatenate([[False], np.isnan(values_N), [False]])
        starts, ends = (np.flatnonzero(np.diff(is_gap_N.astype(np.int8)) == n) for n in (1, -1))
        lengths = ends - starts
        if len(lengths) and lengths.max() > config.max_gap:
            longest = int(lengths.argmax())
            raise DataError(
                f"{config.source!r} has a gap of {lengths[longest]} points under {name!r} from "
                f"line {lines_N[starts[longest]]} on, longer than data.max_gap = {config.max_gap}; "
                "fill it in, raise data.max_gap, or leave the column out with data.columns."
            )


def check_varies(names: Sequence[str], values_NC: Table) -> None:
    """Raise :class:`DataError` for a column that is constant in the training part."""
    for name, values_N in zip(names, values_NC.T, strict=True):
        if len(np.unique(values_N[~np.isnan(values_N)])) < 2:
            raise DataError(
                f"the column {name!r} does not change in the training part, so it cannot be "
                "scaled; leave it out with data.columns."
            )


def check_scaled(
    names: Sequence[str], values_NC: Table, std_C: Table, scaled_NC: Table, lines_N: Sequence[int]
) -> None:
    """Raise :class:`DataError` for columns whose scaled values are no numbers of fp32.

    ``std_C`` are the deviations of the training part.
    """
    for name, values_N, std, scaled_N in zip(names, values_NC.T, std_C, scaled_NC.T, strict=True):
        if not 0 < std < np.inf:
            raise DataError(
                f"the column {name!r} cannot be scaled: its standard deviation in the training "
                f"part comes out as {std:g}; give it in other units, or leave it out with "
                "data.columns."
            )
        beyond_N = np.abs(scaled_N) > MOST_SCALED
        if beyond_N.any():
            place = int(beyond_N.argmax())
            raise DataError(
                f"the column {name!r} has {values_N[place]:g} on line {lines_N[place]}, which is "
                "beyond fp32 at the scale of the training part; correct it, or leave the column "
                "out with data.columns."
            )
