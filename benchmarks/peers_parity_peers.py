"""The systems of benchmarks/peers_parity.py, and how to install and start them."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peers_parity_ranks import HERE, Ranks

FP32_LIMIT, BF16_LIMIT = 1e-4, 2e-2
"""Relative errors that rounding may make."""

DEEPSPEED = ("deepspeed==0.19.8 py-cpuinfo transformers==5.2.0",)
"""AutoEP needs a transformers of early 2026."""
AUTOMODEL = ("--no-deps nemo-automodel==0.7.0", "transformers==5.18.0 datasets pyyaml")
"""The rest of what it asks for is for GPUs and for data."""


@dataclass(frozen=True)
class Peer:
    """How to start a system."""

    title: str
    file: str
    option: str = ""
    limit: float = FP32_LIMIT
    packages: tuple[str, ...] = ()
    """What pip installs, a call each; none if the package index does not have it."""
    degrees: str = "any"
    """``one``: only EP 1. ``ends``: EP 1 or all ranks."""

    python: str = ""
    """Whose Python it runs in, if not that of its file."""
    rival: str = "moeyard"
    """Which of ours computes in the same type."""

    @property
    def python_name(self) -> str:
        """Return the name by which ``--python`` gives its Python."""
        return self.python or self.file

    def can(self, ranks: int, ep: int) -> bool:
        """Say whether the system has this mesh."""
        return {"any": True, "one": ep == 1, "ends": ep in (1, ranks)}[self.degrees]


PEERS = [
    Peer("moeyard", "ours"),
    Peer("moeyard, sockets", "ours", "sockets"),
    Peer("moeyard, bf16", "ours", "bf16", BF16_LIMIT),
    Peer("DeepSpeed", "deepspeed", packages=DEEPSPEED),
    Peer("DeepSpeed ZeRO-1", "deepspeed", "zero1"),
    Peer("DeepSpeed AutoEP", "autoep", python="deepspeed"),
    Peer("transformers DDP", "huggingface", packages=("transformers",), degrees="one"),
    Peer("Tutel", "tutel", degrees="ends"),
    Peer(
        "torchtitan",
        "torchtitan",
        limit=BF16_LIMIT,
        packages=("torchtitan==0.3.0 triton",),
        rival="moeyard, bf16",
    ),
    Peer("Automodel", "automodel", packages=AUTOMODEL),
]


def install(folder: Path) -> dict[str, str]:
    """Make a Python for every system that the package index has; return their paths."""
    found = {}
    for peer in PEERS:
        if not peer.packages:
            continue
        python = folder / peer.file / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / peer.file], check=True)
        for packages in ("torch==2.13.0 numpy setuptools", *peer.packages):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages.split()], check=True)
        found[peer.file] = str(python)
    return found


def start(peer: Peer, pythons: dict[str, str], ranks: int) -> Ranks:
    command = [pythons[peer.python_name], str(HERE / f"peers_parity_{peer.file}.py"), peer.option]
    return Ranks(peer.title, command, ranks)
