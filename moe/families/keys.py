"""Keys of ``config.json`` that families share, to and from our configuration."""

from collections.abc import Iterable
from typing import Any

from ...errors import ModelFileError
from ..attention_config import LinearRope, Llama3Rope, RopeScaling, YarnRope
from ..config import ModelConfig
from ..router_config import TopK

Values = dict[str, Any]
"""The contents of a ``config.json``."""


def read_common(values: Values, theta: float = 10_000.0) -> Values:
    """Return the arguments of :class:`ModelConfig` that all families say alike.

    ``theta`` is what the family means where ``rope_theta`` is missing.
    """
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(name) or {}
    if not isinstance(rope, dict):
        raise ModelFileError(
            f'config.json has {name} = {rope!r}; use an object, such as {{"rope_theta": 10000.0}}.'
        )
    return {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "max_positions": values["max_position_embeddings"],
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", theta)),
        "rope_scaling": _read_scaling(rope, values["max_position_embeddings"]),
        "rms_eps": values.get("rms_norm_eps", 1e-6),
        "tie_embeddings": values.get("tie_word_embeddings", False),
    }


def write_common(config: ModelConfig) -> Values:
    """Return what :func:`read_common` reads."""
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta} | _write_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def check_only(values: Values, supported: Values) -> None:
    """Refuse keys whose value is another than the one we support."""
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise ModelFileError(
                f"config.json has {key} = {values[key]!r}; only {value!r} is supported."
            )


def num_layers(values: Values) -> range:
    """Return the layers' indices; a ``TypeError`` for what is no integer."""
    layers = range(values["num_hidden_layers"])
    if len(layers) > 10_000:  # before anything counts through them
        raise ModelFileError(
            f"config.json has num_hidden_layers = {len(layers)}; the most is 10000."
        )
    return layers


def layers_with(kind: str, layer_types: Iterable[str]) -> tuple[int, ...]:
    """Return the layers of a ``layer_types`` list that are of ``kind``."""
    return tuple(layer for layer, name in enumerate(layer_types) if name == kind)


def write_layer_types(config: ModelConfig) -> list[str]:
    """Return Hugging Face's ``layer_types``."""
    windows = (config.attention.layer_window(layer) for layer in range(config.num_layers))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def read_balance_loss(values: Values, k: int, default: float) -> float:
    """Return our coefficient: Hugging Face's balance loss is k times ours at equal routing."""
    return float(values.get("router_aux_loss_coef", default) * k)


def write_balance_loss(router: TopK) -> Values:
    """Return Hugging Face's coefficient."""
    return {"router_aux_loss_coef": router.balance_loss / router.k}


def _read_scaling(rope: Values, max_positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings") or max_positions
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(factor=rope["factor"])
    if kind == "llama3":
        return Llama3Rope(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=original,
        )
    if kind == "yarn":
        given = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
        return YarnRope(
            factor=rope["factor"],
            original_max_positions=original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
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
        values["original_max_position_embeddings"] = values.pop("original_max_positions")
    return values
