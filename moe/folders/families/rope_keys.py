"""Rotary positions in ``config.json``, to and from our configuration.

Precedence follows transformers (``convert_rope_params_to_dict`` and ``standardize_rope_params`` of
5.23): ``rope_scaling`` over ``rope_parameters``, a theta inside the chosen one over ``rope_theta``,
and ``original_max_position_embeddings`` at the top over the one inside.
"""

from typing import Any

from ....errors import ModelFileError
from ...config.attention import LinearRope, Llama3Rope, RopeScaling, YarnRope
from ...config.model import ModelConfig

Values = dict[str, Any]
"""The contents of a ``config.json``."""

ORIGINAL = "original_max_position_embeddings"


def read_rope(values: Values) -> Values:
    """Return ``rope_theta`` and ``rope_scaling`` of :class:`ModelConfig`."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values[name] or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelFileError(
            f'config.json has {name} = {rope!r}; use an object, such as {{"rope_theta": 10000.0}}.'
        )
    _check_partial(values | rope)
    theta = rope.get("rope_theta", values["rope_theta"])
    if theta is None:
        raise ModelFileError(
            "config.json has rope_theta = null; give it a value, or leave it out for the default."
        )
    return {"rope_theta": theta, "rope_scaling": _read_scaling(rope, values)}


def longest_sequence(max_positions: Any, scaling: RopeScaling | None) -> Any:
    """Return the positions that a model takes; ``max_positions`` is what its config.json says.

    YaRN stretches the original positions by its factor. Model cards (Qwen) add YaRN to config.json
    and leave ``max_position_embeddings`` as it was, and other servers take the product, too.
    """
    if not isinstance(scaling, YarnRope) or not isinstance(max_positions, int):
        return max_positions  # validation says what is wrong with another type
    return max(max_positions, int(scaling.factor * scaling.original_max_positions))


def write_rope(config: ModelConfig) -> Values:
    """Return the keys that :func:`read_rope` reads."""
    theta = {"rope_theta": config.rope_theta}
    return theta | {"rope_parameters": theta | _write_scaling(config.rope_scaling)}


def replaced_rope(source: Values, written: Values) -> Values:
    """Return ``source`` without keys that would override the rope keys of ``written``.

    A ``rope_scaling`` stays, with the same meaning, for readers older than ``rope_parameters``.
    """
    kept = {key: value for key, value in source.items() if key != ORIGINAL}
    rope = written.get("rope_parameters")
    if "rope_scaling" in source and rope is not None:
        kept["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return kept


def _check_partial(values: Values) -> None:
    part = values.get("partial_rotary_factor")
    if part is not None and part != 1:
        raise ModelFileError(
            f"config.json has partial_rotary_factor = {part!r}; only 1.0 is supported."
        )


def _read_scaling(rope: Values, values: Values) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(factor=rope["factor"])
    inside = rope.get(ORIGINAL, values["max_position_embeddings"])
    original: Any = values.get(ORIGINAL, inside)
    if kind == "llama3":
        return Llama3Rope(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=original,
        )
    if kind == "yarn":
        given = ("attention_factor", "mscale", "mscale_all_dim")
        return YarnRope(
            factor=rope["factor"],
            original_max_positions=original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            truncate=bool(rope.get("truncate", True)),  # null means false, as in transformers
            **{name: rope[name] for name in given if rope.get(name) is not None},
        )
    raise ModelFileError(
        f"config.json has rope_type {kind!r}; the known ones are default, linear, llama3 and yarn."
    )


def _write_scaling(scaling: RopeScaling | None) -> Values:
    if scaling is None:
        return {"rope_type": "default"}
    values = scaling.model_dump(mode="json", exclude_none=True)
    values["rope_type"] = values.pop("kind")
    if "original_max_positions" in values:
        values[ORIGINAL] = values.pop("original_max_positions")
    return values
