"""The ``data`` section of runs on time series."""

from itertools import accumulate
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from .data_section import AnyDataConfig

Part = Annotated[float, Field(ge=0)]


class Parts(NamedTuple):
    """Which lines are used for what."""

    train: range
    held_out: range
    """Those of the part that evaluations measure."""
    end: int
    """Lines of all parts together."""


class SeriesConfig(AnyDataConfig):
    """Series of numbers in a CSV file, which train a model that forecasts."""

    loss_unit: ClassVar[str] = "mean over windows"
    measures: ClassVar[dict[str, str]] = {
        "eval_mse": "Mean square error of held-out forecasts, of standardised points",
        "eval_mae": "Mean absolute error of held-out forecasts, of standardised points",
    }
    batch_is: ClassVar[str] = "{batch} windows of {length} points"

    format: Literal["series"] = "series"
    """What the data are."""
    source: str
    """A ``.csv`` file: names in the first line, then a line for each time, in order. Each column of
    numbers is a series by itself; an empty cell or ``nan`` is a point that was not observed."""
    time_column: str = "date"
    """The column with times, which is not read; a file without it has none."""
    columns: tuple[str, ...] | None = None
    """The columns to use; None = all but ``time_column``."""
    split: tuple[Part, Part, Part] = (0.7, 0.1, 0.2)
    """The lines for training, validation and test, one part after the other: shares of all lines,
    or numbers of lines. Lines behind the third part are not used."""
    held_out: Literal["validation", "test"] = "validation"
    """The part that evaluations measure."""
    context: int | None = Field(default=None, ge=1)
    """Points that a forecast reads in evaluations; None = ``train.sequence_length``. They may be of
    the part before."""
    horizon: int = Field(default=96, ge=1)
    """Points that evaluations forecast."""
    max_gap: int = Field(default=24, ge=0)
    """Most points in a row that were not observed; a longer gap is refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        shares = sum(self.split) <= 1 + 1e-9
        if not shares and any(part % 1 for part in self.split):
            raise ValueError(
                f"split is {list(self.split)}; give shares that sum to 1 or less, or three whole "
                "numbers of lines."
            )
        held_out = self.split[1 if self.held_out == "validation" else 2]
        if not self.split[0] or not held_out:
            raise ValueError(
                f"split is {list(self.split)}, which leaves nothing to train on or nothing for "
                f"held_out = {self.held_out}; raise that part."
            )
        if self.columns is not None and not self.columns:
            raise ValueError("columns is empty; name one or more, or leave it out for all.")
        return self

    def parts(self, count: int) -> Parts:
        """Return the parts of ``count`` lines; given numbers may be more than there are."""
        ends = list(accumulate(self.split))
        if ends[2] <= 1 + 1e-9:
            ends = [round(count * end) for end in ends]
        train, validation, test = (int(end) for end in ends)
        held_out = (
            range(train, validation) if self.held_out == "validation" else range(validation, test)
        )
        return Parts(range(train), held_out, test)
