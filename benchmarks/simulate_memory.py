"""Memory that `moeyard simulate` predicts against memory that was measured; for simulate.py.

What a rank keeps between steps: storages that fsdp_memory.py added up on 2 and 4 ranks. What
autograd saves for backward: tensors that its hooks see in the forward of one process, each storage
once, parameters left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moeyard.configuration import validate_config
from moeyard.moe.models.decoder import Decoder
from moeyard.parallel.simulation.cluster import Cluster
from moeyard.parallel.simulation.memory import activations, memory_of
from moeyard.parallel.simulation.workload import Fold, Workload
from moeyard.training.config import RunConfig
from moeyard.training.objectives.next_token import NextToken
from moeyard.training.on_paper import workload_of

MIB = 2**20
ANY = {"memory": "1GB", "memory_bandwidth": "1GB/s", "flops": {"fp32": "1FLOP/s"}}
LINK = {"bandwidth": "1GB/s", "latency": "0s"}
CLUSTER = validate_config(
    Cluster, {"name": "any", "nodes": 1, "gpus_per_node": 4, "gpu": ANY, "inside_node": LINK}
)
SMALL = {
    "vocab_size": 512,
    "d_model": 256,
    "num_layers": 4,
    "num_heads": 4,
    "max_positions": 256,
    "moe": {"num_experts": 8, "d_expert": 512},
}
CASES: dict[str, tuple[dict, Any]] = {
    "k=2": ({}, False),
    "k=2, recompute experts": ({}, "experts"),
    "k=2, recompute": ({}, True),
    "shared expert": ({"moe": {**SMALL["moe"], "d_shared": 512}}, False),
    "dense layers": ({"d_ff": 1024, "dense_layers": [0, 1]}, False),
    "few key heads": ({"num_kv_heads": 1, "num_layers": 6}, False),
}


def memory_rows() -> list[dict[str, Any]]:
    """Return measured and predicted bytes of all cases."""
    return [*_kept(), *(_saved(name, *case) for name, case in CASES.items())]


def _kept() -> Iterator[dict[str, Any]]:
    """Yield what ranks keep between steps, from the results of fsdp_memory.py."""
    from fsdp_memory import MODEL, TRAIN

    results = Path(__file__).parent / "results" / "fsdp_memory.json"
    for row in json.loads(results.read_text())["table"]:
        ranks, precision, dense = row["ranks"], row["precision"], row["parallel.dense"]
        work = _work(
            {**MODEL, "vocab_size": 257},
            {**TRAIN, "precision": precision},
            {"ep": ranks, "dense": dense},
        )
        fold = Fold.of(work, CLUSTER, ranks)
        rows = float(fold.tokens * 2)
        memory = memory_of(work, fold, rows, rows, on_cpu=True)
        case = f"{ranks} ranks, {precision}, {dense}"
        yield _row("kept between steps", case, (row["dense"] + row["experts"]) * MIB, memory.kept)
        # The benchmark's growth of resident memory at the peak, without what is not a tensor.
        yield _row("resident at the peak", case, row["peak"] * MIB, memory.total)


def _saved(name: str, changes: dict, recompute: Any) -> dict[str, Any]:
    """Compare what autograd saves in a forward."""
    work = _work(
        {**SMALL, **changes},
        {"steps": 1, "sequence_length": 256, "batch_sequences": 2, "recompute": recompute},
        {},
    )
    decoder = Decoder(work.model, recompute=recompute)
    windows_BL1 = torch.randint(work.model.vocabulary, (2, work.sequence_length + 1))
    measured = saved_bytes(decoder, windows_BL1)
    fold = Fold.of(work, CLUSTER, 1)
    assert work.model.moe is not None
    rows = float(fold.tokens * work.model.moe.router.k)
    predicted = activations(work, fold, rows, 0.0, on_cpu=True)
    # The prediction is for the start of backward, when the scores also have two gradients, and with
    # recomputation a layer is computed again. Neither is saved in forward.
    predicted -= 2 * 4 * fold.tokens * work.model.vocabulary
    if recompute is True:
        train = {"steps": 1, "sequence_length": 256, "batch_sequences": 2}
        other = _work({**SMALL, **changes, "num_layers": 1}, train, {})
        one = activations(other, fold, rows, 0.0, on_cpu=True)
        none = fold.tokens * (work.model.vocabulary + work.model.d_model) * 3 * 4
        predicted -= one - none
    return _row("saved for backward", name, measured, predicted)


def saved_bytes(decoder: Decoder, windows_BL1: torch.Tensor) -> int:
    """Return the bytes of storages that autograd keeps of a forward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)  # so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        NextToken(decoder)(windows_BL1)
    return sum(found.values())


def _work(model: dict, train: dict, parallel: dict) -> Workload:
    values = {"run_dir": "unset", "model": model, "train": train, "parallel": parallel}
    return workload_of(validate_config(RunConfig, values))


def _row(what: str, case: str, measured: float, predicted: float) -> dict[str, Any]:
    found = {"what": what, "case": case, "measured": measured, "predicted": predicted}
    return {**found, "error": predicted / measured - 1}
