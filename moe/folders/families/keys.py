"""Keys of ``config.json`` that families share, to and from our configuration."""

from collections.abc import Collection, Iterable, Mapping
from typing import cast

from ....errors import ModelFileError
from ...config.model import MOST_LAYERS, LayersConfig, ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from .rope_keys import Values, longest_sequence, read_rope, write_rope

COMMON: Values = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
"""The values of these keys in most families if they are missing."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


def topk_moe(config: LayersConfig) -> tuple[MoEConfig, TopK]:
    """Return the MoE layers of a model and their top-k router.

    Only our own family has other routers; :meth:`Family.why_not` refuses them earlier.
    """
    assert config.moe is not None and config.moe.router.kind == "topk", "why_not was not asked"
    return config.moe, cast(TopK, config.moe.router)


def complete(
    values: Values, defaults: Values, may_be_null: Collection[str], aliases: Mapping[str, str]
) -> Values:
    """Return a ``config.json`` with the values of missing keys, as transformers completes it.

    ``defaults`` are the values of missing keys. Null is allowed for keys of ``may_be_null``, for
    ``rope_theta`` (unless it is needed) and for keys whose default is null. Elsewhere it is
    refused, as in transformers. ``aliases`` are other names of keys, which override the keys.
    """
    for key in (*defaults, *aliases, "head_dim"):
        is_free = key in may_be_null or key == "rope_theta" or defaults.get(key, key) is None
        if key in values and values[key] is None and not is_free:
            raise ModelFileError(
                f"config.json has {key} = null; give it a value, or leave it out for the default."
            )
    named = {key: values[alias] for alias, key in aliases.items() if alias in values}
    return defaults | values | named


def read_common(values: Values) -> Values:
    """Return the arguments of :class:`ModelConfig` that have the same keys in all families."""
    rope = read_rope(values)
    return {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values.get("head_dim"),
        "max_positions": longest_sequence(values["max_position_embeddings"], rope["rope_scaling"]),
        "rms_eps": values["rms_norm_eps"],
        "tie_embeddings": values["tie_word_embeddings"],
        **rope,
    }


def write_common(config: ModelConfig) -> Values:
    """Return the keys that :func:`read_common` reads."""
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **write_rope(config),
    }


def check_only(values: Values, supported: Values) -> None:
    """Refuse keys whose value is not the one we support."""
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise ModelFileError(
                f"config.json has {key} = {values[key]!r}; only {value!r} is supported."
            )


def num_layers(values: Values) -> range:
    """Return the layers' indices; raise ``TypeError`` unless the number is an integer."""
    layers = range(values["num_hidden_layers"])
    if len(layers) > MOST_LAYERS:  # before anything iterates over them
        raise ModelFileError(
            f"config.json has num_hidden_layers = {len(layers)}; the most is {MOST_LAYERS}."
        )
    return layers


def read_windows(
    values: Values, window: int | None, usual: Iterable[bool]
) -> tuple[int | None, tuple[int, ...]]:
    """Return the window and the layers that have it.

    ``layer_types`` names the layers, or ``usual`` if it is null; ``window`` is their width.
    """
    kinds = values["layer_types"]
    if kinds is None:
        kinds = [_SLIDING if has_window else _FULL for has_window in usual]
    unknown = next((kind for kind in kinds if kind not in (_FULL, _SLIDING)), None)
    if unknown is not None:
        raise ModelFileError(
            f"config.json has {unknown!r} in layer_types; the known ones are {_FULL} and "
            f"{_SLIDING}."
        )
    if len(kinds) != len(num_layers(values)):
        raise ModelFileError(
            f"config.json has {len(kinds)} layer_types for num_hidden_layers = "
            f"{values['num_hidden_layers']}; name each layer's."
        )
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
    if layers and window is None:
        raise ModelFileError(
            f"config.json has {_SLIDING} in layer_types, but no window is in use; give "
            "sliding_window a value and set use_sliding_window to true if it is there."
        )
    return (window, layers) if layers else (None, ())


def write_layer_types(config: ModelConfig) -> list[str]:
    """Return Hugging Face's ``layer_types``."""
    windows = (config.attention.layer_window(layer) for layer in range(config.num_layers))
    return [_FULL if window is None else _SLIDING for window in windows]
