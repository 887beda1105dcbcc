"""A folder's ``generation_config.json``: how to sample, and which tokens end a text."""

from typing import Any

from ...errors import ConfigError, ModelFileError
from ..models.sampling import GenerationConfig, SamplingParams
from .folder import ModelFolder

FILE = "generation_config.json"
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "num_beams": 1,
}
"""Ways to choose tokens that are not supported, and the values that switch them off."""


def read_generation_config(folder: ModelFolder) -> GenerationConfig:
    """Read the file; without a file, use the end-of-text ids of ``config.json``."""
    values = folder.read_optional(FILE)
    eos_ids = _end_of_text_ids(folder)
    return GenerationConfig(
        _sampling(values),
        eos_ids,
        tuple(sorted(eos_ids.difference(range(folder.config.vocabulary)))),
        tuple(
            key
            for key, neutral in NEUTRAL.items()
            if values.get(key, neutral) not in (neutral, None)
        ),
    )


def generation_to_keep(folder: ModelFolder) -> dict[str, Any]:
    """Return the file's contents for a folder that is written from this one; empty without a file.

    An empty file is not the same as none: it overrides the end-of-text ids of ``config.json``.
    """
    values = folder.read_optional(FILE)
    return values or ({"eos_token_id": None} if (folder.path / FILE).exists() else {})


def _sampling(values: dict[str, Any]) -> SamplingParams:
    """Read the parameters; ``do_sample: false`` is greedy, and without it other values count."""
    if values.get("do_sample") is False:
        return SamplingParams(temperature=0)
    given = {
        key: values[key] for key in ("temperature", "top_p", "top_k") if values.get(key) is not None
    }
    for key, value in given.items():
        if type(value) not in ((int,) if key == "top_k" else (int, float)):
            raise ModelFileError(
                f"{FILE} has {key} = {value!r}, which is not a number; correct it."
            )
    try:
        return SamplingParams(**given)
    except ConfigError as error:
        raise ModelFileError(f"{FILE}: {error}") from None


def _end_of_text_ids(folder: ModelFolder) -> frozenset[int]:
    """Return the ids of ``generation_config.json`` if it exists, else those of ``config.json``.

    As in transformers, the file replaces the ids of ``config.json`` even if it has none.
    """
    name = FILE if (folder.path / FILE).exists() else "config.json"
    value = folder.read_optional(name).get("eos_token_id")
    if value is None:
        return frozenset()
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if type(token) is not int:
            raise ModelFileError(f"{name} has eos_token_id {token!r}; use an id or a list of ids.")
    return frozenset(tokens)
