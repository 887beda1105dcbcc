"""Shared by tests of decoding: random prompts, and reading them position by position."""

import torch

from moeyard.moe.batch import batch_of
from moeyard.moe.models.decoder import Decoder


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator) for length in lengths]


@torch.inference_mode()
def hidden_by_steps(model: Decoder, sequences, prefix: int) -> list[torch.Tensor]:
    """Read ``prefix`` ids in one step, then one by one, all sequences together."""
    caches = [model.new_cache() for _ in sequences]
    chunks = [[ids[:prefix] for ids in sequences]]
    longest = max(map(len, sequences))
    chunks += [[ids[at : at + 1] for ids in sequences] for at in range(prefix, longest)]
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for chunk in chunks:
        present = [index for index, ids in enumerate(chunk) if len(ids)]
        some = [chunk[index] for index in present]
        out = model(batch_of(some, [caches[index] for index in present])).hidden_TD
        for index, rows in zip(present, out.split([len(ids) for ids in some]), strict=True):
            found[index].append(rows)
    return [torch.cat(rows) for rows in found]
