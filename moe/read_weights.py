"""Fill a decoder from a model folder, tensor by tensor, straight into the memory that keeps it."""

import torch
from torch import Tensor, nn

from ..errors import ModelFileError
from ..kernels.memory import prefer_huge_pages
from .config import ModelConfig
from .decoder import Decoder
from .layer import Experts
from .model_folder import ModelFolder
from .tensor_names import is_router


def read_dense(folder: ModelFolder, decoder: Decoder, dtype: torch.dtype) -> None:
    """Give every tensor outside the experts memory in ``dtype`` and its contents, for inference.

    Routers keep the type the decoder has them in.
    """
    for name, meta in [*decoder.named_parameters(), *decoder.named_buffers()]:
        if not meta.is_meta and isinstance(meta, nn.Parameter):
            continue  # experts, read already
        keeps_type = not meta.is_floating_point() or is_router(name)
        target = torch.empty(meta.shape, dtype=meta.dtype if keeps_type else dtype)
        prefer_huge_pages(target)
        read_tensor(folder, name, target)
        owner_name, _, leaf = name.rpartition(".")
        owner = decoder.get_submodule(owner_name)
        if isinstance(meta, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(target, requires_grad=False))
        else:
            owner.register_buffer(leaf, target)
    if decoder.config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight


def read_tensor(folder: ModelFolder, name: str, target: Tensor) -> None:
    """Fill ``target`` with one of the decoder's tensors outside the experts."""
    folder.read_into(name, target)
    if name.endswith("gate.table_VK"):
        _check_table(name, target, folder.config)


def read_experts(folder: ModelFolder, experts: Experts, layer: int) -> None:
    """Fill the experts that are here, whichever they are."""
    for expert, views in zip(experts.expert_ids, experts.slot_views(), strict=True):
        folder.read_expert(layer, expert, views)


def _check_table(name: str, table_VK: Tensor, config: ModelConfig) -> None:
    assert config.moe is not None, "only MoE layers have tables"
    lowest, highest = (int(bound) for bound in table_VK.aminmax())
    if lowest < 0 or highest >= config.moe.num_experts:
        raise ModelFileError(
            f"{name} names experts from {lowest} to {highest}, but there are "
            f"{config.moe.num_experts}; the weights belong to another configuration."
        )
