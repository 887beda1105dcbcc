"""What benchmarks/invariance.py runs: a small model, in one parallel way after another."""

from dataclasses import dataclass, field

STEPS, HALF = 100, 50
RANKS = 4
TEXT = "".join(f"def function_{n}(a):\n    return [a * {n}, {n % 7} - a]\n" for n in range(600))
CONFIG = {
    "seed": 3,
    "run_dir": "unset",
    "model": {
        "d_model": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 256,
        "moe": {
            "num_experts": 8,
            "d_expert": 16,
            "d_shared": 8,
            "router": {
                "kind": "topk",
                "k": 2,
                "score": "sigmoid",
                "bias_update_rate": 0.001,
                "balance_loss": 0.0,
                "sequence_balance_loss": 0.001,
                "z_loss": 0.001,
            },
        },
    },
    "data": {"tokenizer": "bytes", "source": "unset"},
    "train": {"steps": STEPS, "sequence_length": 32, "batch_sequences": 8, "eval_sequences": 8},
    "optimizer": {"lr": 0.003, "warmup_steps": 10},
    "checkpoint": {"every": HALF, "keep": 2},
    "parallel": {"backend": "reference"},
}
EP2, EP4 = ["parallel.ep=2"], ["parallel.ep=4"]
NODES = ["parallel.path=hierarchical", "parallel.ranks_per_node=2"]
GATHER = ["parallel.path=all_gather"]
CAPACITY = "model.moe.router.capacity={factor: 1.0}"
COPY_BYTES = 3 * 32 * 16 * 16
"""Weights and gradients of an expert in fp64."""
FEW = f"max_bytes: {4 * COPY_BYTES}"
"""Copies of two experts for each of the two layers that have some at a time."""


def chunks(forward: int, backward: int) -> list[str]:
    return [f"parallel.chunks={forward}", f"parallel.backward_chunks={backward}"]


@dataclass(frozen=True)
class Arm:
    """A run on four ranks; all options are overrides of the run's configuration."""

    overrides: list[str]
    apart: bool = False
    """Exchange through gloo, as on several hosts, and not through shared memory."""
    first_half: list[str] | None = None
    """Options until step 50, where the run stops and goes on with ``overrides``."""
    first_ranks: int = RANKS
    like: list[str] = field(default_factory=list)
    """Options of the run on one process, too."""


ARMS = {
    "ep 1, edp 4": Arm([]),
    "ep 2, edp 2": Arm(EP2),
    "ep 4, edp 1": Arm(EP4),
    "ep 2, fsdp": Arm([*EP2, "parallel.dense=fsdp"]),
    "ep 4 without shared memory": Arm(EP4, apart=True),
    "chunks 1, backward 2": Arm([*EP4, *chunks(1, 2)]),
    "chunks 2, backward 1": Arm([*EP4, *chunks(2, 1)]),
    "chunks 2, backward 2": Arm([*EP2, *chunks(2, 2)]),
    "chunks 3, backward 4": Arm([*EP4, *chunks(3, 4)]),
    "chunks 4, backward 3": Arm([*EP4, *chunks(4, 3)], apart=True),
    "chunks 4, backward 8": Arm([*EP2, *chunks(4, 8)]),
    "chunks 8, backward 8": Arm([*EP4, *chunks(8, 8)]),
    "chunks auto": Arm([*EP4, "parallel.chunks=auto"]),
    "path and chunks auto": Arm([*EP4, "parallel.path=auto", "parallel.chunks=auto", NODES[1]]),
    "hierarchical": Arm([*EP4, *NODES]),
    "hierarchical, chunks 4, backward 2": Arm([*EP4, *NODES, *chunks(4, 2)], apart=True),
    "all_gather": Arm([*EP4, *GATHER]),
    "all_gather, chunks 2, backward 3": Arm([*EP2, *GATHER, *chunks(2, 3)]),
    "copies of every expert on every rank": Arm([*EP4, "parallel.copies={when: always}"]),
    "copies of 3 experts, ep 2": Arm([*EP2, "parallel.copies={when: always, experts: 3}"]),
    "copies, all_gather, chunks 2": Arm(
        [*EP4, *GATHER, *chunks(2, 2), "parallel.copies={when: always}"]
    ),
    "padded to the capacity": Arm([*EP4, "parallel.path=padded"], like=[CAPACITY]),
    "gradient slices": Arm([*EP4, "parallel.gradient_slices=auto"], apart=True),
    "few copies, rematerialized": Arm(
        [*EP4, f"parallel.copies={{when: always, {FEW}, rematerialize: true}}"], apart=True
    ),
    "few copies, rematerialized, hierarchical": Arm(
        [*EP4, *NODES, f"parallel.copies={{when: always, {FEW}, rematerialize: true}}"]
    ),
    "owners move every 10 steps": Arm([*EP4, "parallel.copies={when: always, reshard_every: 10}"]),
    "owners move every 7 steps, ep 2, few copies": Arm(
        [*EP2, f"parallel.copies={{when: always, {FEW}, rematerialize: true, reshard_every: 7}}"]
    ),
    "two micro-batches, recomputed, hierarchical, few copies": Arm(
        [*EP4, *NODES, f"parallel.copies={{when: always, {FEW}, rematerialize: true}}"],
        like=["train.accumulation=2", "train.recompute=true"],
    ),
    "resumed at 50, ep 4": Arm(EP4, first_half=EP4),
    "resumed at 50, ep 4 then 2": Arm(EP2, first_half=EP4),
    "resumed at 50, ep 2 then 4 hierarchical": Arm([*EP4, *NODES], first_half=EP2),
    "resumed at 50, one process then ep 4": Arm(EP4, first_half=[], first_ranks=1),
    "resumed at 50, moved owners": Arm(
        [*EP4, "parallel.copies={when: always, reshard_every: 10}"],
        first_half=[*EP4, "parallel.copies={when: always, reshard_every: 10}"],
    ),
    "resumed at 50, moved owners then ep 2": Arm(
        EP2, first_half=[*EP4, "parallel.copies={when: always, reshard_every: 10}"]
    ),
}
"""By name, one line each."""
