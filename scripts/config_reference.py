"""Write docs/configuration.md and training/schema.json from the typed models of a run.

    .venv/bin/python scripts/config_reference.py

A key's text is the docstring under it, its limits are those that its model checks.
"""

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moeyard.training.config import RunConfig

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "configuration.md"
SCHEMA = ROOT / "training" / "schema.json"

HEAD = """# Configuration of a training run

`scripts/config_reference.py` writes this page from the typed models; do not edit it by hand.

A run is one YAML file. Give it to `moeyard train CONFIG`, and change single keys
behind it: `train.steps=200 optimizer.lr=3e-4`. `--print-config` shows the result with all defaults.
An unknown key is an error. `null` in YAML is `None` in the texts below.

For completion and hints in an editor, put this line on top of the file, with the path from it to
the schema in your copy of moeyard. Editors with the YAML language server read it.

```yaml
# yaml-language-server: $schema=../../training/schema.json
```
"""

LIMITS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "multiple_of": "a multiple of {}",
    "min_length": "{} or more of them",
}
OWN_ROUTER = {
    "type": "object",
    "properties": {"kind": {"type": "string", "pattern": ":", "description": "MODULE:CLASS"}},
    "additionalProperties": True,
}
"""A router of the user's own code."""
SCALARS = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}


def page() -> str:
    """Return the whole page."""
    parts = [HEAD, _section("The top level", "", RunConfig)]
    seen: set[tuple[str, type]] = {("", RunConfig)}
    for path, model in _sections(RunConfig, ""):
        if (path, model) not in seen:
            seen.add((path, model))
            parts.append(_section(f"`{path}`{_named(model)}", f"{path}.", model))
    return "\n".join(parts)


def _named(model: type[BaseModel]) -> str:
    """Return which of several sections of a path it is."""
    if "kind" in model.model_fields:
        return f" with `kind: {model.model_fields['kind'].default}`"
    if "format" in model.model_fields:
        return f" with `format: {' or '.join(get_args(model.model_fields['format'].annotation))}`"
    return ""


def _sections(
    model: type[BaseModel], prefix: str, around: frozenset[type[BaseModel]] = frozenset()
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield path and model of each section; ``around`` are those on the way, which are known."""
    for name, field in model.model_fields.items():
        models = [inner for inner in _models_in(field.annotation) if inner not in around]
        for inner in models:
            yield f"{prefix}{name}", inner
            yield from _sections(inner, f"{prefix}{name}.", around | set(models))


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a key may hold: for a router, one for each kind."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    else:
        for argument in get_args(kind):
            yield from _models_in(argument)


def _section(title: str, prefix: str, model: type[BaseModel]) -> str:
    texts = _texts(model)
    lines = [f"## {title}", "", *textwrap.wrap(_about(model), 100), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name == "kind":  # it is in the title
            continue
        if name not in texts:
            texts[name] = _about(next(_models_in(field.annotation), None))
        cells = [f"`{prefix}{name}`", _value(field), _default(field), texts[name]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _about(model: type[BaseModel] | None) -> str:
    return (
        ""
        if model is None
        else _markdown(inspect.cleandoc(model.__doc__ or "").partition("\n\nFields:")[0])
    )


def _texts(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring under each key, those of base classes included."""
    found = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        body = tree.body[0].body  # type: ignore[attr-defined]
        for statement, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and is_text:
                found[statement.target.id] = _markdown(inspect.cleandoc(after.value.value))
    return found


def _markdown(text: str) -> str:
    """Return reStructuredText's code and roles as Markdown's, on one line."""
    words = " ".join(text.split())
    for role in (":class:", ":data:", ":meth:", ":mod:"):
        words = words.replace(role, "")
    return words.replace("``", "`")


def _value(field: FieldInfo) -> str:
    """Return type and limits."""
    limits = []
    for rule in field.metadata:
        for name, words in LIMITS.items():
            if getattr(rule, name, None) is not None:
                limits.append(words.format(f"{getattr(rule, name):,}".replace(",", " ")))
    kinds = [_type(kind) for kind in _alternatives(field.annotation)]
    nothing = ["or null"] if "null" in kinds else []
    given = " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    return " ".join([", ".join([given, *limits]), *nothing])


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in SCALARS:
        return SCALARS[kind]
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in arguments)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin is tuple:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return "list of: " + " and ".join(dict.fromkeys(map(_type, inner)))
    assert isinstance(kind, type) and issubclass(kind, BaseModel), kind
    return "section"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        named = value.model_dump().get("kind")
        return f"`kind: {named}`" if named else "all defaults"
    return f"`{json.dumps(value)}`"


def schema() -> str:
    """Return the JSON schema for editors and for training/key_check.py.

    No key is required, because the command line and ``start_from`` may give what a file lacks.
    """
    found = RunConfig.model_json_schema()
    models = {model.__name__: model for _, model in _sections(RunConfig, "")}
    for name, section in {**found["$defs"], "RunConfig": found}.items():
        section.pop("required", None)
        texts = _texts(models.get(name, RunConfig))
        for key, value in section["properties"].items():
            value.pop("title", None)
            if key in texts:
                value["description"] = texts[key]
    for owner in ("MoEConfig", "LocalSearch"):
        router = found["$defs"][owner]["properties"]["router"]
        del router["discriminator"]
        router["oneOf"].append(OWN_ROUTER)
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
