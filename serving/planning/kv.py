"""``--kv-memory``: what a server keeps for keys and values, and the sentence that says so."""

import torch

from ...errors import ConfigError
from ...moe.folders.folder import ModelFolder
from ...moe.folders.tensor_names import dense_tensors
from ...moe.kv_blocks import BLOCK, bytes_per_block
from ..engine.kv_memory import blocks_within, kv_bytes_of, most_blocks
from ..experts.budget import bytes_of_experts
from .budget import PAGE_CACHE_BYTES, RESERVE, Demand
from .describe import size
from .sizes import kv_specs

LEAST_TOKENS = 1024
"""Kept where less is free by the rule below: it is little next to the processes themselves."""


def asked_kv_bytes(
    folder: ModelFolder, dtype: torch.dtype, text: str | None, demand: Demand
) -> int | None:
    """Return the bytes that a user asks for; None leaves the choice to :func:`free_kv_bytes`.

    Raises :class:`ConfigError` for less than one block.
    """
    if text is None:
        return None
    if not folder.config.generates:
        raise ConfigError(
            f"kv-memory is {text!r}, but {folder.path} keeps no keys and values between requests; "
            "leave it out."
        )
    each = _block_bytes(folder, dtype, demand)
    return kv_bytes_of(text, each, demand.max_num_seqs, _longest(folder, demand))


def free_kv_bytes(
    folder: ModelFolder,
    dtype: torch.dtype,
    expert_memory: str | None,
    demand: Demand,
    available_bytes: int,
) -> int:
    """Return what is free in each replica next to all weights, up to what could ever be used."""
    whole = int(available_bytes * (1 - RESERVE)) - demand.other_bytes - demand.host_bytes
    if expert_memory is not None:
        whole -= PAGE_CACHE_BYTES
    dense = sum(tensor.numel() for _, tensor in dense_tensors(folder.config)) * dtype.itemsize
    weights = dense + bytes_of_experts(folder, dtype, expert_memory) + demand.copies_bytes
    block_bytes = _block_bytes(folder, dtype, demand)
    most = most_blocks(demand.max_num_seqs, _longest(folder, demand))
    least = min(most, LEAST_TOKENS // BLOCK)
    free = (whole // demand.num_replicas - weights) // block_bytes
    return min(most, max(least, free)) * block_bytes


def describe_kv(folder: ModelFolder, dtype: torch.dtype, kv_bytes: int, demand: Demand) -> str:
    """Return the sentence about keys and values with which a server starts."""
    block_bytes, longest = _block_bytes(folder, dtype, demand), _longest(folder, demand)
    most = most_blocks(demand.max_num_seqs, longest)
    blocks = min(most, blocks_within(kv_bytes, block_bytes))
    each = " in each replica" if demand.num_replicas > 1 else ""
    text = f"Keys and values get {size(blocks * block_bytes)}{each}: "
    text += f"{blocks * BLOCK:,} tokens of all requests together."
    if blocks < most:
        text += f" A full batch of the longest texts would take {size(most * block_bytes)}"
        text += "; requests wait for each other where it does not fit."
    if blocks * BLOCK < longest:
        text += f" So a request may have {blocks * BLOCK:,} tokens and not {longest:,}."
    if demand.kv_dtype is not None:
        text += f" They are rounded to {demand.kv_dtype}, which is lossy (docs/offloading.md)."
    return text


def _block_bytes(folder: ModelFolder, dtype: torch.dtype, demand: Demand) -> int:
    return bytes_per_block(kv_specs(folder, dtype), demand.kv_dtype)


def _longest(folder: ModelFolder, demand: Demand) -> int:
    return demand.max_model_len or folder.config.max_positions
