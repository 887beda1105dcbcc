"""The routers of benchmarks/two_digits.py. An epoch has 32 steps; local search ends after five."""

GATES: dict[str, dict] = {
    "topk": {"kind": "topk", "k": 2},
    "hash": {"kind": "hash", "k": 2, "table": "random"},
    "dselect": {"kind": "dselect", "k": 2},
    "comet": {"kind": "comet", "k": 2},
}


def searched(gate: dict) -> dict:
    """Return a gate with permutation-based local search (the paper's +)."""
    return {"kind": "local_search", "router": gate, "search_steps": 160}


ARMS = GATES | {f"{name}+": searched(gate) for name, gate in GATES.items()}
