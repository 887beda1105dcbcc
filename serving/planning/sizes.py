"""What a model's parts take, from the headers of its folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import ConfigError
from ...moe.config.model import decoder_config
from ...moe.folders.folder import ModelFolder
from ...moe.folders.tensor_names import dense_tensors
from ...moe.kv_blocks import BLOCK, KVDtype, bytes_per_block
from ...moe.kv_cache import KVCacheSpec
from ...moe.models.decoder import Decoder
from ...moe.without_memory import without_memory
from ..engine.kv_memory import specs_of
from ..experts.pools import PoolSize, bytes_of_slots, divide_slots, pool_sizes


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model in the type that it is opened in."""

    dense_bytes: int
    """All weights outside the experts."""
    num_experts: int
    """Of all layers together."""
    expert_bytes: int
    """One expert in memory; the mean where widths differ."""
    stored_expert_bytes: int
    """One expert in the folder; the mean where widths differ."""
    experts_per_token: int
    """Of all layers together."""
    dense_bytes_per_token: int
    """Weights outside the experts that a token reads: all but the embedding's other rows."""
    kv_bytes_per_token: int
    """Keys and values of one position, of all layers."""
    max_positions: int
    widths: tuple[PoolSize, ...] = ()
    """The experts of each width, the widest first, where widths differ."""
    row_name: str = "token"
    """What a row of the model is."""
    row_names: str = "tokens"
    """Several of them."""
    keeps_rows: bool = True
    """Whether requests keep keys and values of their rows."""

    @property
    def pools(self) -> tuple[PoolSize, ...]:
        """The experts of each width."""
        return self.widths or (PoolSize(self.num_experts, self.expert_bytes),)

    @property
    def all_experts_bytes(self) -> int:
        """All experts in memory."""
        return sum(pool.num_experts * pool.slot_bytes for pool in self.pools)

    @property
    def smallest_budget(self) -> int:
        """The bytes below which no store can work: one expert of each width."""
        return sum(pool.slot_bytes for pool in self.pools)

    def slots_within(self, budget_bytes: int) -> tuple[int, ...]:
        """Return how many experts of each width a budget holds."""
        return divide_slots(self.pools, budget_bytes)

    def bytes_of(self, num_slots: Sequence[int]) -> int:
        """Return the bytes of experts, given as a number for each width."""
        return bytes_of_slots(num_slots, [pool.slot_bytes for pool in self.pools])

    @property
    def bytes_per_token(self) -> int:
        """Weights that a token reads from memory when it is the only one."""
        return self.dense_bytes_per_token + self.experts_per_token * self.expert_bytes


def sizes_of(
    folder: ModelFolder, dtype: torch.dtype, kv_dtype: KVDtype | None = None
) -> ModelSizes:
    """Return the sizes of a model; raises :class:`ConfigError` for one without experts.

    ``kv_dtype`` is what keys and values are rounded to; None = not at all.
    """
    config = folder.config
    if config.moe is None:
        raise ConfigError(f"{folder.path} has no experts, so there is nothing to keep on disk.")
    dense = {name: tensor.numel() * dtype.itemsize for name, tensor in dense_tensors(config)}
    total = sum(dense.values())
    embedding = 0 if config.ties_embeddings else dense.get("embed_tokens.weight", 0)
    num_layers = len(config.moe_layers)
    pools = pool_sizes(folder, dtype)
    return ModelSizes(
        dense_bytes=total,
        num_experts=num_layers * config.moe.num_experts,
        expert_bytes=_mean_bytes(pools),
        stored_expert_bytes=_mean_bytes(pool_sizes(folder, folder.dtype)),
        experts_per_token=num_layers * config.moe.router.k,
        dense_bytes_per_token=total - embedding,
        kv_bytes_per_token=bytes_per_block(kv_specs(folder, dtype), kv_dtype) // BLOCK,
        max_positions=config.max_positions,
        widths=pools if len(pools) > 1 else (),
        row_name=config.row_name,
        row_names=config.row_names,
        keeps_rows=config.generates,
    )


def _mean_bytes(pools: Sequence[PoolSize]) -> int:
    total = sum(pool.num_experts * pool.slot_bytes for pool in pools)
    return round(total / sum(pool.num_experts for pool in pools))


def kv_specs(folder: ModelFolder, dtype: torch.dtype) -> list[KVCacheSpec]:
    """Return what each layer keeps per position; nothing for a model that continues no text."""
    if not folder.config.generates:
        return []
    with without_memory():
        specs = specs_of(Decoder(decoder_config(folder.config), expert_ids=()))
    return [replace(spec, dtype=dtype) for spec in specs]
