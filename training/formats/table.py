"""The kinds of data that ``data.format`` names; a new kind is a file and a line here."""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from .data_section import AnyDataConfig
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


def kind_of(section: Any) -> type[AnyDataConfig] | None:
    """Return the kind of a section, which may be wrong in other ways; None for no known format."""
    name = section.get("format", "text") if isinstance(section, dict) else None
    kinds: tuple[type[AnyDataConfig], ...] = get_args(AnyData)
    found = (kind for kind in kinds if name in get_args(kind.model_fields["format"].annotation))
    return next(found, None)


def has_tokenizer(section: dict[str, Any]) -> bool:
    """Say whether a section, which may be wrong in other ways, is of a format of texts."""
    kind = kind_of(section)
    return kind is None or "tokenizer" in kind.model_fields
