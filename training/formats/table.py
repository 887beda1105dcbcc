"""The kinds of data that ``data.format`` names; a new kind is a file and a line here."""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from .images import ImagesConfig
from .pairs import PairsConfig
from .preference import PreferenceConfig
from .series import SeriesConfig
from .sessions import SessionsConfig
from .super_resolution import SuperResolutionDataConfig
from .text import LabelledConfig, TextConfig


def _with_format(values: Any) -> Any:
    """Fill in the format of a section that names none."""
    if isinstance(values, dict) and "format" not in values:
        return {"format": "text", **values}
    return values


AnyData = (
    TextConfig
    | LabelledConfig
    | SeriesConfig
    | PairsConfig
    | SessionsConfig
    | ImagesConfig
    | SuperResolutionDataConfig
    | PreferenceConfig
)
DataSection = Annotated[AnyData, Field(discriminator="format"), BeforeValidator(_with_format)]


def has_tokenizer(section: dict[str, Any]) -> bool:
    """Say whether a section, which may be wrong in other ways, is of a format of texts."""
    name = section.get("format", "text")
    found = [
        one for one in get_args(AnyData) if name in get_args(one.model_fields["format"].annotation)
    ]
    return not found or "tokenizer" in found[0].model_fields
