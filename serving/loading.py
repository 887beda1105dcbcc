"""Open a model folder for inference, with all experts in memory or behind a store."""

from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError, ModelFileError
from ..kernels.expert_weights import empty_slots
from ..kernels.memory import prefer_huge_pages
from ..moe.config import ModelConfig
from ..moe.decoder import Decoder
from ..moe.language_model import LanguageModel
from ..moe.layer import AnyExperts, Experts, MoELayer
from ..moe.model_folder import ModelFolder
from ..moe.tensor_names import expert_tensor_name, tensor_name
from .budget import parse_budget
from .offload import OffloadedExperts
from .store import ExpertStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    folder: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    expert_memory: str | None = None,
) -> LanguageModel:
    """Open a Hugging Face MoE folder or a run's export as a model ready to call.

    ``dtype`` is ``float32`` or ``bfloat16`` (None = as stored); routers stay in fp32 under
    bfloat16. ``expert_memory`` (``2GiB``, ``25%``) bounds the experts kept in memory; the others
    are read from the folder when they are needed, and outputs are the same bit for bit.
    """
    return open_model(folder, dtype, device, expert_memory)[0]


def open_model(
    folder: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    expert_memory: str | None = None,
) -> tuple[LanguageModel, ExpertStore | None]:
    """Do what :func:`load` does and return the store too, if there is one."""
    if device != "cpu":
        raise ConfigError(f"device is {device!r}; this release serves on 'cpu'.")
    files = ModelFolder(Path(folder))
    try:
        return _open(files, dtype, expert_memory)
    except BaseException:
        files.close()
        raise


def _open(
    files: ModelFolder, dtype: str | None, expert_memory: str | None
) -> tuple[LanguageModel, ExpertStore | None]:
    files.check()
    chosen = pick_dtype(files, dtype)
    with torch.device("meta"):
        decoder = Decoder(files.config, expert_ids=())
    store = None
    if expert_memory is not None:
        store = open_store(files, chosen, expert_memory)
    for index, layer in decoder.moe_layers():
        layer.experts = _experts(files, layer, index, chosen, store)
    _read_dense(files, decoder, chosen)
    model = LanguageModel(decoder, end_of_text_ids(files))
    if store is None:
        files.close()
    return model, store


def open_store(files: ModelFolder, dtype: torch.dtype, expert_memory: str) -> ExpertStore:
    """Open a store with a budget as people write it."""
    return ExpertStore(files, dtype, parse_budget(expert_memory, expert_bytes(files, dtype)))


def expert_bytes(files: ModelFolder, dtype: torch.dtype) -> int:
    """Return the bytes all experts take in ``dtype``."""
    config, moe = files.config, files.config.moe
    if moe is None:
        return 0
    num_layers = sum(config.is_moe(layer) for layer in range(config.num_layers))
    return num_layers * moe.num_experts * 3 * moe.d_expert * config.d_model * dtype.itemsize


def end_of_text_ids(files: ModelFolder) -> set[int]:
    """Return the ids that end a text: those of config.json and of generation_config.json."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = files.read_optional(name).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < files.config.vocabulary:
                raise ModelFileError(
                    f"{name} has eos_token_id {token!r}; it must be an id below "
                    f"{files.config.vocabulary}."
                )
            found.add(token)
    return found


def pick_dtype(files: ModelFolder, name: str | None) -> torch.dtype:
    """Return the asked type, or the folder's own."""
    if name is None:
        name = files.values.get("dtype") or files.values.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _experts(
    files: ModelFolder,
    layer: MoELayer,
    index: int,
    dtype: torch.dtype,
    store: ExpertStore | None,
) -> AnyExperts:
    config, moe = files.config, files.config.moe
    assert moe is not None, "only MoE layers come here"
    if store is not None:
        return OffloadedExperts(store, index, moe.num_experts)
    with torch.device("meta"):
        experts = Experts(config.d_model, moe.d_expert, moe.num_experts, activation=moe.activation)
    fc1 = empty_slots(moe.num_experts, 2 * moe.d_expert, config.d_model, dtype)
    fc2 = empty_slots(moe.num_experts, config.d_model, moe.d_expert, dtype)
    experts.fc1 = nn.Parameter(fc1, requires_grad=False)
    experts.fc2 = nn.Parameter(fc2, requires_grad=False)
    for expert, views in enumerate(experts.slot_views()):
        for part, view in views.items():
            files.read_into(expert_tensor_name(index, expert, part), view)
    return experts


def _read_dense(files: ModelFolder, decoder: Decoder, dtype: torch.dtype) -> None:
    """Give every tensor outside the experts memory and its contents."""
    for name, meta in [*decoder.named_parameters(), *decoder.named_buffers()]:
        if not meta.is_meta and isinstance(meta, nn.Parameter):
            continue  # experts, read already
        keeps_type = not meta.is_floating_point() or ".mlp.gate." in name
        target = torch.empty(meta.shape, dtype=meta.dtype if keeps_type else dtype)
        prefer_huge_pages(target)
        files.read_into(tensor_name(name), target)
        if name.endswith("gate.table_VK"):
            _check_table(name, target, files.config)
        owner_name, _, leaf = name.rpartition(".")
        owner = decoder.get_submodule(owner_name)
        if isinstance(meta, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(target, requires_grad=False))
        else:
            owner.register_buffer(leaf, target)
    if decoder.config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight


def _check_table(name: str, table_VK: torch.Tensor, config: ModelConfig) -> None:
    assert config.moe is not None, "only MoE layers have tables"
    lowest, highest = (int(bound) for bound in table_VK.aminmax())
    if lowest < 0 or highest >= config.moe.num_experts:
        raise ModelFileError(
            f"{name} names experts from {lowest} to {highest}, but there are "
            f"{config.moe.num_experts}; the weights belong to another configuration."
        )
