"""What the ranks of equivalence_worker.py computed, joined and compared."""

from pathlib import Path

import torch

WORKER = str(Path(__file__).parent / "equivalence_worker.py")
EXACT = ["train.precision=fp64", "parallel.backend=reference"]


def gathered_from(out: Path, name: str, ranks: int) -> list[dict]:
    """Join the ranks' shares; what several ranks hold must be the same on all of them."""
    steps = [torch.load(out / f"{name}-{rank}.pt") for rank in range(ranks)]
    joined = []
    for shares in zip(*steps, strict=True):
        whole = {k: shares[0][k] for k in ("loss", "balance", "grad_norm", "counts")}
        for share in shares:
            assert share["loss"] == whole["loss"] and share["grad_norm"] == whole["grad_norm"]
            assert torch.equal(share["counts"], whole["counts"])
            for kind in ("gradients", "weights"):
                held = whole.setdefault(kind, {})
                for key, tensor in share[kind].items():
                    assert key not in held or torch.equal(held[key], tensor), f"{key} differs"
                    held[key] = tensor
        for kind in ("gradients", "weights"):
            whole[kind] = with_whole_experts(whole[kind])
        joined.append(whole)
    return joined


def with_whole_experts(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put the slices of experts, ``NAME|INDEX of COUNT``, together."""
    slices: dict[str, dict[int, torch.Tensor]] = {}
    whole = {}
    for key, tensor in held.items():
        name, _, part = key.partition("|")
        if part:
            slices.setdefault(name, {})[int(part.split()[0])] = tensor
        else:
            whole[name] = tensor
    for name, parts in slices.items():
        ordered = [parts[index] for index in range(len(parts))]
        if name.endswith("fc2"):
            whole[name] = torch.cat(ordered, dim=1)
        else:  # gate rows, then up rows
            halves = zip(*(part.chunk(2) for part in ordered), strict=True)
            whole[name] = torch.cat([torch.cat(half) for half in halves])
    return whole


def differences(actual: dict, expected: dict) -> dict[str, float]:
    """Return the largest difference of each kind, relative to the largest expected value."""
    found = {
        name: abs(actual[name] - expected[name]) / max(abs(expected[name]), 1e-30)
        for name in ("loss", "balance", "grad_norm")
    }
    for kind in ("gradients", "weights"):
        assert actual[kind].keys() == expected[kind].keys()
        found[kind] = max(
            float((actual[kind][k] - e).abs().max() / e.abs().max().clamp(min=1e-30))
            for k, e in expected[kind].items()
        )
    return found
