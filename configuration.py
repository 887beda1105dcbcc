"""Read a YAML configuration with ``a.b=c`` overrides into a pydantic model, with helpful errors."""

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def read_values(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read ``path`` and apply overrides; every problem is a :class:`ConfigError`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration {path} cannot be read ({error.strerror}); give an existing YAML file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"configuration {path} is not YAML: {reason}; correct the file."
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} holds a {type(values).__name__}; use key: value.")
    for override in overrides:
        apply_override(values, override)
    return values


def validate_config(model: type[Model], values: dict[str, Any]) -> Model:
    """Validate ``values``; the first problem becomes a one-sentence :class:`ConfigError`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(_sentence(model, values, problem)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in a nested dict; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form key.key=value.")
    *parents, last = path.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r} goes into {parent}, which is not a section.")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r} has a value that is not YAML.") from None


def unknown_key(path: str, known: Iterable[str]) -> str:
    """Return the sentence about a key that does not exist; ``known`` are those that do."""
    others = sorted(set(known) - {path})  # another kind may know it
    close = difflib.get_close_matches(path, others, n=1, cutoff=0.6)
    message = f"{path} is not a known key"
    return f"{message}; did you mean {close[0]}?" if close else f"{message}; remove it."


def unknown_kind(path: str, kind: str | None, context: Mapping[str, Any]) -> str:
    """Return the sentence about a kind that does not exist; ``context`` is pydantic's."""
    known = context.get("expected_tags", "")
    if kind is None:
        return f"{path} is missing; use one of {known or 'the known kinds'}."
    close = difflib.get_close_matches(kind, [name.strip("' ") for name in known.split(",")], n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"use one of {known}."
    return f"{path} is {kind!r}; {remedy}"


def with_others(overrides: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return overrides together with arguments that the command line has no option for.

    Raises :class:`ConfigError` if one of these looks like an option: ``--train.steps 5``.
    """
    found = [*overrides, *others]
    for index, argument in enumerate(found):
        if argument.startswith("-"):
            key, _, value = argument.lstrip("-").partition("=")
            following = found[index + 1] if index + 1 < len(found) else ""
            value = value or (following if "=" not in following else "") or "VALUE"
            raise ConfigError(f"{argument} is not an option; write {key}={value} to set a key.")
    return found


def _sentence(model: type[BaseModel], values: dict[str, Any], problem: Any) -> str:
    is_absent = problem["type"] in ("missing", "extra_forbidden")
    path = ".".join(_path_in(values, problem["loc"], is_absent))
    if problem["type"] == "extra_forbidden":
        return unknown_key(path, _known_paths(model))
    if problem["type"] == "missing":
        return f"{path} is missing; give it in the file or as {path}=VALUE."
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{path}: {message}" if path else message
    if problem["type"].startswith("union_tag"):
        return unknown_kind(f"{path}.kind", problem["ctx"].get("tag"), problem["ctx"])
    message = problem["msg"].replace("Input", f"it is {problem['input']!r}, but", 1)
    return f"{path}: {message}."


def _path_in(values: Any, location: tuple[int | str, ...], is_absent: bool) -> Iterator[str]:
    """Drop the parts of pydantic's location that name a branch of a union rather than a key.

    ``is_absent`` says that the last part names a key that may be missing.
    """
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(values, dict) and (part in values or (is_last and is_absent)):
            yield str(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            yield str(part)
            values = values[part]
        elif not isinstance(values, dict | list) and is_last:
            return


def _known_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for child in _models_in(field.annotation):
            yield from _known_paths(child, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)
