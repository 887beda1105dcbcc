"""Where this rank computes, and its random generator."""

import hashlib

import torch


def device() -> torch.device:
    """Return where this rank computes: its GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def seed_rank(seed: int, rank: int) -> None:
    """Seed the global generator, which only router noise draws from."""
    digest = hashlib.sha256(f"{seed}/rank{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
