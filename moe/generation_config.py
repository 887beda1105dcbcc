"""What a folder's ``generation_config.json`` says about answers: how to sample, what ends them."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, ModelFileError
from .model_folder import ModelFolder
from .sampling import SamplingParams

FILE = "generation_config.json"
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "num_beams": 1,
}
"""Ways to choose tokens that are not offered, and the values that ask for none of them."""


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Defaults that a caller may override."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Where the file says nothing: temperature 1, all tokens."""
    eos_ids: frozenset[int] = frozenset()
    """Ids that end a text."""
    not_followed: tuple[str, ...] = ()
    """Keys whose wish is not met."""


def read_generation_config(folder: ModelFolder) -> GenerationConfig:
    """Read the file and the end-of-text ids of ``config.json``; without it defaults hold."""
    values = folder.read_optional(FILE)
    return GenerationConfig(
        _sampling(values),
        _end_of_text_ids(folder),
        tuple(
            key
            for key, neutral in NEUTRAL.items()
            if values.get(key, neutral) not in (neutral, None)
        ),
    )


def _sampling(values: dict[str, Any]) -> SamplingParams:
    """``do_sample: false`` is greedy; where it is missing, other values still say how to sample."""
    if values.get("do_sample") is False:
        return SamplingParams(temperature=0)
    given = {
        key: values[key] for key in ("temperature", "top_p", "top_k") if values.get(key) is not None
    }
    for key, value in given.items():
        if type(value) not in ((int,) if key == "top_k" else (int, float)):
            raise ModelFileError(f"{FILE} has {key} = {value!r}, which is no number; mend it.")
    try:
        return SamplingParams(**given)
    except ConfigError as error:
        raise ModelFileError(f"{FILE}: {error}") from None


def _end_of_text_ids(folder: ModelFolder) -> frozenset[int]:
    found: set[int] = set()
    for name in ("config.json", FILE):
        value = folder.read_optional(name).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < folder.config.vocabulary:
                raise ModelFileError(
                    f"{name} has eos_token_id {token!r}; it must be an id below "
                    f"{folder.config.vocabulary}."
                )
            found.add(token)
    return frozenset(found)
