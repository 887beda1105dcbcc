"""The kinds of data that ``data.format`` names; a new kind is a file and a line here."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .preference import PreferenceConfig
from .text import LabelledConfig, TextConfig


def _with_format(values: Any) -> Any:
    """Fill in the format of a section that names none."""
    if isinstance(values, dict) and "format" not in values:
        return {"format": "text", **values}
    return values


AnyData = TextConfig | LabelledConfig | PreferenceConfig
DataSection = Annotated[AnyData, Field(discriminator="format"), BeforeValidator(_with_format)]
