"""What all sections of a training configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section that does not change, whose unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
