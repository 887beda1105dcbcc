"""The routers of benchmarks/two_digits.py."""

ARMS: dict[str, dict] = {
    "topk": {"kind": "topk", "k": 2},
    "hash": {"kind": "hash", "k": 2, "table": "random"},
}
