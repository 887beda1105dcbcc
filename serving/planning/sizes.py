"""What a model's parts take, from the headers of its folder."""

from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ...moe.folders.expert_slots import expert_bytes
from ...moe.folders.folder import ModelFolder
from ...moe.folders.tensor_names import dense_tensors
from ...moe.models.decoder import Decoder
from ...moe.without_memory import without_memory


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model in the type that it is opened in."""

    dense_bytes: int
    """All weights outside the experts."""
    num_experts: int
    """Of all layers together."""
    expert_bytes: int
    """One expert in memory."""
    stored_expert_bytes: int
    """One expert in the folder."""
    experts_per_token: int
    """Of all layers together."""
    dense_bytes_per_token: int
    """Weights outside the experts that a token reads: all but the embedding's other rows."""
    kv_bytes_per_token: int
    """Keys and values of one position, of all layers."""
    max_positions: int

    @property
    def all_experts_bytes(self) -> int:
        """All experts in memory."""
        return self.num_experts * self.expert_bytes

    @property
    def bytes_per_token(self) -> int:
        """Weights that a token reads from memory when it is the only one."""
        return self.dense_bytes_per_token + self.experts_per_token * self.expert_bytes


def sizes_of(folder: ModelFolder, dtype: torch.dtype) -> ModelSizes:
    """Return the sizes of a model; raises :class:`ConfigError` for one without experts."""
    config = folder.config
    if config.moe is None:
        raise ConfigError(f"{folder.path} has no experts, so there is nothing to keep on disk.")
    dense = {name: tensor.numel() * dtype.itemsize for name, tensor in dense_tensors(config)}
    total = sum(dense.values())
    embedding = 0 if config.tie_embeddings else dense["embed_tokens.weight"]
    num_layers = len(config.moe_layers)
    return ModelSizes(
        dense_bytes=total,
        num_experts=num_layers * config.moe.num_experts,
        expert_bytes=expert_bytes(config, dtype, folder.packed),
        stored_expert_bytes=expert_bytes(config, folder.dtype, folder.packed),
        experts_per_token=num_layers * config.moe.router.k,
        dense_bytes_per_token=total - embedding,
        kv_bytes_per_token=_kv_elements(folder) * dtype.itemsize,
        max_positions=config.max_positions,
    )


def _kv_elements(folder: ModelFolder) -> int:
    """Return the numbers that one position keeps."""
    with without_memory():
        cache = Decoder(folder.config, expert_ids=()).new_cache(1)
    specs = [cache.spec(layer) for layer in range(folder.config.num_layers)]
    return sum(spec.num_kv_heads * (spec.head_dim + spec.v_dim) for spec in specs)
