"""What a model folder says of the series that its model was trained on."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import ModelFileError
from ..models.forecaster import TrainedOn
from ..models.series_values import Scale

FILE = "series.json"
"""What a model was trained on, ``{"context": 512, "columns": {"x": {"mean": 1.5, "std": 0.5}}}``. A
point minus the mean, over the standard deviation, is what the model reads."""


class _Column(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    mean: float
    std: float = Field(gt=0)


class _Series(BaseModel):
    context: int | None = Field(default=None, ge=1)
    columns: dict[str, _Column] = {}


def read_trained_on(folder: Path) -> TrainedOn:
    """Return what the folder of a run's model says; nothing for another's.

    Raises :class:`ModelFileError` for a file that is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return TrainedOn()
    try:
        found = _Series.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ModelFileError(
            f"{path} cannot be read ({reason}); export the run again, or remove the file."
        ) from None
    scales = {name: Scale(column.mean, column.std) for name, column in found.columns.items()}
    return TrainedOn(found.context, scales)
