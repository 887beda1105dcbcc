"""Convert a model folder: other types, quantized experts, rewritten files."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...dtypes import LONG_NAMES, short_name, spellings, torch_dtype
from ...errors import ConfigError
from ...kernels.values.quantized_weights import Bits
from ..config.model import LayersConfig
from .belongings import copy_belongings
from .channel_layout import bundle, check_layout
from .compressed_tensors import PackedFormat, packed_name
from .families.table import FAMILIES
from .folder import ModelFolder
from .generation_config import generation_to_keep
from .group_sparse_format import NAME as INT4_SPARSE
from .group_sparse_format import GroupSparseFormat, choose_sparsity, group_sparse_config
from .hf_config import WHY_BY_CHANNEL, WHY_MIXED, to_hf
from .hub import local_folder
from .quantized_config import mixed_quantization_config, quantization_config
from .shards import TensorPlan
from .tensor_names import dense_tensors, is_router
from .two_of_four_format import NAME as TWO_OF_FOUR
from .two_of_four_format import choose_two_of_four, pack_plans, two_of_four_config
from .write_few_bits import choose_format
from .write_group_sparse import Pruner, prune
from .write_weights import FolderWeights, plan_weights
from .writer import write_model_folder

Key = tuple[int, int]
"""Layer and expert."""

log = logging.getLogger(__name__)

DTYPES = ("fp32", "bf16", "int8", "int4", INT4_SPARSE, TWO_OF_FOUR)
"""What weights may be written as."""
BITS: dict[str | None, Bits] = {"int8": 8, "int4": 4}


def convert(
    source: str | Path,
    target: Path,
    dtype: str | None = None,
    ignore_unused_weights: bool = False,
    bits_of: Mapping[Key, Bits] | None = None,
    sparsity: float | None = None,
    pruner: Pruner | None = None,
    by_channel: bool = False,
) -> str:
    """Write a model to folder ``target`` and return its ``model_type`` there.

    ``source`` is a folder or a name on the hub. ``dtype`` is the type of the weights: ``fp32``,
    ``bf16`` (or torch's names for these), ``int8``, ``int4``, ``int4_sparse`` or ``2:4``; None
    widens quantized weights and keeps the others. Those of few bits apply to the routed experts
    only. ``2:4`` is ``bf16`` with packed experts, of which two of each four weights must be zeros.
    ``int4_sparse`` needs a ``pruner``, such as a :class:`.Calibration`, and prunes a share of
    ``sparsity`` of the experts' weights, by default half. ``bits_of`` gives each expert a width, by
    layer and expert, in place of ``dtype``. ``by_channel`` lays experts out as channel_layout.py
    says. Tokenizer, chat template and generation config are copied. Weights that ``config.json``
    does not ask for are left out, and refused without ``ignore_unused_weights``. One tensor, or one
    expert, is in memory at a time.
    """
    dtype, source = _known_dtype(dtype), local_folder(source)
    folder = ModelFolder(source)
    try:
        left_out = folder.check(ignore_unused_weights=ignore_unused_weights)
        if left_out is not None:
            log.warning("%s", left_out)
        config = folder.config
        why_ours = _why_ours(config, dtype, bits_of is not None, by_channel)
        sparse = _sparse_format(folder, dtype, sparsity)
        packed = _packed_formats(config, dtype, bits_of)
        half = choose_two_of_four(config) if dtype == TWO_OF_FOUR else None
        plain = _plain_dtype(folder, dtype)
        values = to_hf(
            config,
            str(plain).removeprefix("torch."),
            source=folder.values,
            has_separate_experts=any(f is not None for f in (packed, sparse, half)),
            why_ours=why_ours,
        )
        weights, family = FolderWeights(folder, plain), FAMILIES[values["model_type"]]
        plans = plan_weights(config, family, weights, plain, _router_dtype(folder, plain), packed)
        if packed is not None:
            values["quantization_config"] = _quantization(packed, plans)
        if sparse is not None:
            plans = prune(plans, sparse, config, family, _given(pruner))
            values["quantization_config"] = group_sparse_config(sparse)
        if half is not None:
            plans, values["quantization_config"] = pack_plans(plans, half), two_of_four_config()
        if by_channel:
            plans = bundle(plans, config.d_model)
        generation = generation_to_keep(folder)
        belongings = partial(copy_belongings, source)
        write_model_folder(target, values, plans, belongings, generation)
    finally:
        folder.close()
    return family.model_type


def _known_dtype(name: str | None) -> str | None:
    dtype = short_name(name)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; use one of {spellings(DTYPES)}.")
    return dtype


def _why_ours(
    config: LayersConfig, dtype: str | None, is_mixed: bool, by_channel: bool
) -> str | None:
    """Return why no other family's folder may be written; None where one may.

    Raises :class:`ConfigError` where experts cannot be laid out by channel.
    """
    if by_channel:
        check_layout(config, is_rounded=dtype not in (None, "fp32", "bf16"))
        return WHY_BY_CHANNEL
    return WHY_MIXED if is_mixed else None


def _plain_dtype(folder: ModelFolder, dtype: str | None) -> torch.dtype:
    """Return the type of what is not in few bits."""
    if dtype == TWO_OF_FOUR:
        return torch.bfloat16
    return torch_dtype(dtype) if dtype in LONG_NAMES else folder.dtype


def _packed_formats(
    config: LayersConfig, dtype: str | None, bits_of: Mapping[Key, Bits] | None
) -> PackedFormat | dict[Key, PackedFormat] | None:
    """Return how experts are rounded: all alike, each in its way, or not at all."""
    if bits_of is not None:
        formats = {bits: choose_format(config, bits) for bits in set(bits_of.values())}
        return {key: formats[bits] for key, bits in bits_of.items()}
    return choose_format(config, BITS[dtype]) if dtype in BITS else None


def _sparse_format(
    folder: ModelFolder, dtype: str | None, sparsity: float | None
) -> GroupSparseFormat | None:
    if dtype == INT4_SPARSE:
        return choose_sparsity(folder.config, 0.5 if sparsity is None else sparsity)
    if sparsity is not None:
        raise ConfigError(f"sparsity is {sparsity}, but dtype {dtype}; use dtype {INT4_SPARSE}.")
    return None


def _given(pruner: Pruner | None) -> Pruner:
    if pruner is None:
        raise ConfigError(f"dtype is {INT4_SPARSE}, which needs a calibration; give one.")
    return pruner


def _router_dtype(folder: ModelFolder, plain: torch.dtype) -> torch.dtype:
    """Return the type to write routers in: their stored type if it is wider."""
    for name, tensor in dense_tensors(folder.config):
        if is_router(name) and tensor.is_floating_point() and tensor.ndim == 2:
            stored, _ = folder.stored(name)
            return torch.promote_types(stored, plain)
    return plain


def _quantization(
    packed: PackedFormat | Mapping[tuple[int, int], PackedFormat], plans: Iterable[TensorPlan]
) -> dict[str, Any]:
    """Return what config.json says about the experts' formats."""
    if isinstance(packed, PackedFormat):
        return quantization_config(packed, _plain_matrices(plans))
    matrices: dict[PackedFormat, list[str]] = {}
    suffix = packed_name("weight")
    for plan in plans:
        if plan.name.endswith(suffix) and plan.layer is not None and plan.expert is not None:
            name = plan.name.removesuffix(suffix) + "weight"
            matrices.setdefault(packed[plan.layer, plan.expert], []).append(name)
    return mixed_quantization_config(matrices, _plain_matrices(plans))


def _plain_matrices(plans: Iterable[TensorPlan]) -> list[str]:
    """Return the matrices that are not quantized."""
    return [p.name for p in plans if p.name.endswith(".weight") and len(p.shape) == 2]
