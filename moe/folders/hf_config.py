"""Our model configuration to and from a Hugging Face ``config.json``.

A model that transformers has a class for is written as that family (``moe/folders/families``).
Any other is ``model_type: moeyard``, with the same tensor names and a sentence with the reason.
"""

from typing import Any

from pydantic import ValidationError

from ...configuration import unknown_kind
from ...errors import ModelFileError
from ..config.model import LayersConfig
from .families.balance_keys import OWN_KEY
from .families.family import Family
from .families.native import NATIVE
from .families.rope_keys import replaced_rope
from .families.table import FAMILIES, family_for, why_native

WHY_MIXED = (
    "Experts differ in width, and transformers rounds all experts of a layer alike: it would read "
    "other weights without a word."
)
WHY_BY_CHANNEL = (
    "Experts are laid out by channel, and transformers would take random numbers for up and down."
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NOT_KEPT = ("auto_map", "quantization_config", "torch_dtype", OWN_KEY)
"""Keys of a folder that are wrong for folders written from it: its code, its types, the loss of
another run."""


def to_hf(
    config: LayersConfig,
    dtype: str,
    token_ids: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    has_separate_experts: bool = False,
    why_ours: str | None = None,
) -> dict[str, Any]:
    """Return the contents of ``config.json``.

    ``token_ids`` are its ``eos_token_id`` and the like. ``source`` is the ``config.json`` that the
    model came from: its family is kept if it can express the model, and so are unknown keys.
    ``has_separate_experts`` leaves out families that keep many experts in one tensor;
    ``why_ours`` leaves out all that others read, for this reason.
    """
    source = source or {}
    family = NATIVE
    if why_ours is None:
        family = family_for(config, source.get("model_type"), has_separate_experts)
    values = {"dtype": dtype} | family.config_values(config) | (token_ids or {})
    if family is NATIVE:
        values["why_moeyard"] = why_ours or why_native(config)
        return {key: source.get(key) for key in TOKEN_IDS} | values
    if family.model_type == source.get("model_type"):
        dropped = (*NOT_KEPT, *family.aliases)
        kept = {key: value for key, value in source.items() if key not in dropped}
        return replaced_rope(kept, values) | values
    return {key: source[key] for key in TOKEN_IDS if key in source} | values


def find_family(values: dict[str, Any]) -> Family:
    """Return the family of a ``config.json``; raise :class:`ModelFileError` for an unknown one."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelFileError(
            f"config.json has model_type {model_type!r}; the known ones are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def from_hf(values: dict[str, Any]) -> LayersConfig:
    """Read a ``config.json``; unknown architectures and features raise :class:`ModelFileError`."""
    family = find_family(values)
    try:
        return family.read_config(values)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ModelFileError(
            f"config.json has a value of the wrong type ({error}); copy it again."
        ) from None
    except KeyError as error:
        raise ModelFileError(f"config.json has no {error.args[0]!r}; add it.") from None
    except ValidationError as error:
        raise ModelFileError(f"config.json: {_sentence(error, values)}.") from None


def _sentence(error: ValidationError, values: dict[str, Any]) -> str:
    """Say what is wrong, with the file's key if one of its keys has the value in question."""
    problem = error.errors()[0]
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]).removesuffix(".")
    found, name = problem["input"], ".".join(map(str, problem["loc"]))
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return unknown_kind(f"{name}.kind", context["tag"], context).removesuffix(".")
    same = [key for key, value in values.items() if type(value) is type(found) and value == found]
    rule = problem["msg"].removeprefix("Input ").partition(",")[0]
    return f"{same[0] if len(same) == 1 else name} is {repr(found)[:80]}; it {rule}"
