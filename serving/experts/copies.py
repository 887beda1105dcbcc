"""Low-bit copies of all experts in memory: the same model, converted to fewer bits."""

from pathlib import Path

import torch

from ...errors import ConfigError
from ...kernels.values.quantized_weights import SlotWeights
from ...moe.folders.expert_slots import empty_experts, expert_bytes
from ...moe.folders.folder import ModelFolder
from ...moe.folders.hub import local_folder
from ...moe.folders.read_weights import WeightRead, expert_reads, run_reads
from ...moe.folders.tensor_names import dense_tensors, is_router
from ...moe.routes.identity import identity_of
from .fallback import Fallback
from .options import StoreOptions
from .store import ExpertStore

OPTION = "expert-fallback"


def copies_bytes(options: StoreOptions, dtype: torch.dtype) -> int:
    """Return the bytes that copies of all experts take in memory, 0 without copies."""
    if options.fallback is None:
        return 0
    copy = ModelFolder(local_folder(options.fallback))
    try:
        config = copy.config
        if config.moe is None:
            return 0
        number = len(config.moe_layers) * config.moe.num_experts
        return number * expert_bytes(config, dtype, copy.packed)
    finally:
        copy.close()


def check_fallback(folder: ModelFolder, options: StoreOptions, dtype: torch.dtype) -> int:
    """Return :func:`copies_bytes`; raises :class:`ConfigError` for copies of another model."""
    if options.fallback is not None:
        copy = ModelFolder(local_folder(options.fallback))
        try:
            check_copy(folder, copy)
        finally:
            copy.close()
    return copies_bytes(options, dtype)


def open_fallback(
    store: ExpertStore, folder: ModelFolder, dtype: torch.dtype, options: StoreOptions
) -> Fallback | None:
    """Return the fallback that the options ask for, with its copies in memory.

    Where a correction checks windows, it is on for proposals only, and what they lack is not read:
    the check reads it once for all rows.
    """
    if options.fallback is None:
        return None
    copies = read_copies(folder, options.fallback, dtype)
    alone = options.correction is None
    return Fallback(store, copies, options.fallback_above, is_on=alone, reads_later=alone)


def read_copies(folder: ModelFolder, path: Path, dtype: torch.dtype) -> dict[int, SlotWeights]:
    """Return the experts of the folder ``path``, by MoE layer; expert e is in slot e.

    Raises :class:`ConfigError` unless it is the model of ``folder`` in fewer bits.
    """
    copy = ModelFolder(local_folder(path))
    try:
        check_copy(folder, copy)
        copy.check(ignore_unused_weights=True)
        config, layers = copy.config, dict[int, SlotWeights]()
        assert config.moe is not None, "checked"
        reads: list[WeightRead] = []
        for layer in config.moe_layers:
            weights = empty_experts(config, config.moe.num_experts, dtype, copy.packed)
            views = ((slot, weights.slot_views(slot)) for slot in range(weights.num_slots))
            reads += expert_reads(copy, layer, views)
            layers[layer] = weights
        run_reads(copy, reads)
        return layers
    finally:
        copy.close()


def check_copy(folder: ModelFolder, copy: ModelFolder) -> None:
    """Raise :class:`ConfigError` unless ``copy`` is the model of ``folder`` in fewer bits.

    Compares architectures, and all weights of the routers.
    """
    if copy.packed is None:
        raise ConfigError(
            f"{OPTION} is {copy.path}, whose experts are not quantized; make a copy with moeyard "
            "convert --dtype int8 or int4."
        )
    same = identity_of(folder.config) == identity_of(copy.config)
    if not (same and _routers_are_equal(folder, copy)):
        raise ConfigError(
            f"{OPTION} is {copy.path}, which is another model than {folder.path}; make a copy of "
            "this one with moeyard convert --dtype int8 or int4."
        )


def _routers_are_equal(folder: ModelFolder, copy: ModelFolder) -> bool:
    """Compare routers in the type of the two that has fewer bits."""
    for name, tensor in dense_tensors(folder.config):
        if not (is_router(name) and tensor.is_floating_point()):
            continue
        if (name in folder) != (name in copy):
            return False
        if name not in folder:
            continue
        narrow = min(folder.stored(name)[0], copy.stored(name)[0], key=lambda type_: type_.itemsize)
        ours, theirs = torch.empty(tensor.shape), torch.empty(tensor.shape)
        folder.read_into(name, ours)
        copy.read_into(name, theirs)
        if not torch.equal(ours.to(narrow), theirs.to(narrow)):
            return False
    return True
