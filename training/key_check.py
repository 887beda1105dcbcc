"""Check the keys of a configuration against its JSON schema, before anything heavy is imported.

``schema.json`` is written from the typed models (scripts/config_reference.py), and a test keeps
them equal. A typo is so answered in a fraction of a second. The typed models check all else later.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configuration import unknown_key
from ..errors import ConfigError

SCHEMA = Path(__file__).parent / "schema.json"

Schema = dict[str, Any]


def check_keys(values: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` for the first key that no configuration of a run has."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    definitions = schema["$defs"]
    known = sorted(_paths([schema], definitions, ""))
    for path, key, value in _unknown(values, [schema], definitions, ""):
        if ":" in key and value is None:
            spaced = key.replace(":", ": ", 1)
            raise ConfigError(
                f"{path} is one word in YAML; write a space after the colon: {spaced}."
            )
        raise ConfigError(unknown_key(path, known))


def _unknown(
    values: dict[str, Any], sections: list[Schema], definitions: Schema, prefix: str
) -> Iterator[tuple[str, str, Any]]:
    """Yield path, key and value of each key that none of ``sections`` knows."""
    sections = _of_kind(values, sections)
    if any(section.get("additionalProperties", True) for section in sections):
        return  # a router of the user's own
    for key, value in values.items():
        inner = [s["properties"][key] for s in sections if key in s["properties"]]
        if not inner:
            yield f"{prefix}{key}", str(key), value
        elif isinstance(value, dict):
            below = [found for part in inner for found in _sections(part, definitions)]
            if below:
                yield from _unknown(value, below, definitions, f"{prefix}{key}.")


def _of_kind(values: dict[str, Any], sections: list[Schema]) -> list[Schema]:
    """Return the sections that fit ``kind``, or all of ours where none does."""
    kind = values.get("kind")
    if isinstance(kind, str) and ":" in kind:
        return [section for section in sections if "pattern" in _kind_of(section)]
    ours = [section for section in sections if "pattern" not in _kind_of(section)]
    return [section for section in ours if _kind_of(section).get("const") == kind] or ours


def _kind_of(section: Schema) -> Schema:
    found: Schema = section["properties"].get("kind", {})
    return found


def _sections(schema: Schema, definitions: Schema) -> Iterator[Schema]:
    """Yield the sections that a value may be."""
    if "$ref" in schema:
        yield from _sections(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    elif "properties" in schema:
        yield schema
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _sections(part, definitions)


def _paths(sections: list[Schema], definitions: Schema, prefix: str) -> Iterator[str]:
    for section in sections:
        for key, schema in section["properties"].items():
            yield f"{prefix}{key}"
            yield from _paths(list(_sections(schema, definitions)), definitions, f"{prefix}{key}.")
