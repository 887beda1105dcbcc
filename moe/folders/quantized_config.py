"""``quantization_config`` in config.json, for weights in the compressed-tensors format.

``config_groups`` maps schemes to their modules (``targets``); ``ignore`` lists modules that are not
quantized. An entry is a module's name, its class, or ``re:`` and a pattern that must match
from the name's first character. Readers of the file differ:

- compressed-tensors quantizes the modules that match a target and no entry of ``ignore``.
- transformers finds the scheme of its fused experts by looking for "experts" in a pattern.
- vLLM asks about ``<experts>.0.gate_proj``, ``.up_proj`` and ``.down_proj``, in every family. It
  may refuse a linear layer that matches neither a target nor ``ignore``, so ``ignore`` names every
  module that is not quantized.
"""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import ModelFileError
from ...kernels.values.quantized_weights import WIDTH_UNIT
from .compressed_tensors import PackedFormat
from .packed_schemes import PackedSchemes, check_targets, expert_targets

METHOD = "compressed-tensors"
LAYOUT = "pack-quantized"

EXPERTS = r"re:.*\.experts\..*\d+\.\w+$"
"""Matches every matrix of every routed expert, but not shared experts or the experts' module."""

REMEDY = (
    "use a model whose weights are symmetric int4 or int8 in the pack-quantized format of "
    "compressed-tensors, or MXFP4 (gpt_oss), or not quantized"
)


def quantization_config(packed: PackedFormat, plain_matrices: Iterable[str]) -> dict[str, Any]:
    """Return the value for config.json of a model whose routed experts alone are quantized.

    ``plain_matrices`` are the names of the tensors of all other matrices, ``X.weight``.
    """
    return _config([_scheme(packed, [EXPERTS])], plain_matrices)


def mixed_quantization_config(
    matrices: Mapping[PackedFormat, Sequence[str]], plain_matrices: Iterable[str]
) -> dict[str, Any]:
    """Return the value for config.json of a model whose routed experts differ in format.

    ``matrices`` are the names of the experts' matrices of each format. Each format is a group, and
    its targets name the experts by layer.
    """
    schemes = [
        _scheme(packed, expert_targets([name.removesuffix(".weight") for name in names]))
        for packed, names in matrices.items()
    ]
    return _config(schemes, plain_matrices)


def _scheme(packed: PackedFormat, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": packed.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if packed.group_size is None else "group",
        "group_size": packed.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": LAYOUT,
    }


def _config(schemes: Iterable[dict[str, Any]], plain_matrices: Iterable[str]) -> dict[str, Any]:
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{n}": scheme for n, scheme in enumerate(schemes)},
        "ignore": [name.removesuffix(".weight") for name in plain_matrices],
        "kv_cache_scheme": None,
    }


def read_quantization_config(values: Any) -> PackedFormat | PackedSchemes:
    """Read the value of ``quantization_config``.

    Raises :class:`ModelFileError` for every other method, layout or kind of rounding. The names of
    the tensors say which matrices are quantized, and the targets only where groups differ.
    """
    path = "quantization_config"
    config = {"quant_method": None, "format": None, **_object(path, values)}
    _expect(path, config, "quant_method", METHOD)
    _expect(path, config, "format", LAYOUT)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key) not in (None, {}, {"config_groups": {}}, {"format": "dense"}):
            raise _refusal(f"{path}.{key}", config[key])
    groups = _object(f"{path}.config_groups", config.get("config_groups"))
    places = {f"{path}.config_groups.{name}": group for name, group in groups.items()}
    found = [(_read_scheme(place, group), place, group) for place, group in places.items()]
    if len({packed for packed, _, _ in found}) == 1:
        return found[0][0]
    return PackedSchemes(
        tuple(
            (packed, check_targets(f"{place}.targets", group.get("targets")))
            for packed, place, group in found
        )
    )


def _read_scheme(path: str, values: Any) -> PackedFormat:
    scheme = _object(path, values)
    _expect(path, scheme, "format", LAYOUT, None)
    _expect(path, scheme, "input_activations", None)
    _expect(path, scheme, "output_activations", None)
    weights = _object(f"{path}.weights", scheme.get("weights"))
    path += ".weights"
    # An absent key means what it means to compressed-tensors.
    bits = _expect(path, weights, "num_bits", 8, 4)
    _expect(path, weights, "type", "int")
    _expect(path, weights, "symmetric", True)
    _expect(path, weights, "dynamic", False)
    # Inputs sorted by activation ("group", "dynamic") would need an index that is not read.
    _expect(path, weights, "actorder", None, False, "weight", "static")
    group_size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy == "channel" or (strategy is None and group_size == -1):
        return PackedFormat(bits, None)
    if strategy not in ("group", None):
        raise _refusal(f"{path}.strategy", strategy)
    if type(group_size) is not int or group_size <= 0 or group_size % WIDTH_UNIT:
        raise ModelFileError(
            f"config.json has {path}.group_size = {group_size!r}; only multiples of {WIDTH_UNIT} "
            "are read."
        )
    return PackedFormat(bits, group_size)


def _expect(path: str, values: dict[str, Any], key: str, default: Any, *others: Any) -> Any:
    value = values.get(key, default)
    if not any(value == known and type(value) is type(known) for known in (default, *others)):
        raise _refusal(f"{path}.{key}", value)
    return value


def _object(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise _refusal(path, value)
    return value


def _refusal(path: str, value: Any) -> ModelFileError:
    return ModelFileError(
        f"config.json has {path} = {reprlib.repr(value)}, which is not read; {REMEDY}."
    )
