"""Configurations of every router, for the tests that all routers pass."""

CASES: dict[str, dict] = {
    "topk": {"kind": "topk", "k": 2, "balance_loss": 0.01, "z_loss": 0.001},
    "topk_sigmoid_bias": {"kind": "topk", "k": 2, "score": "sigmoid", "bias_update_rate": 0.01},
    "topk_pregated": {"kind": "topk", "k": 2, "lookahead": "previous_block"},
    "topk_preattention": {"kind": "topk", "k": 1, "lookahead": "attention_input"},
    "hash": {"kind": "hash", "k": 1, "table": "random"},
    "hash_balanced": {"kind": "hash", "k": 2},
    "hash_bigram": {"kind": "hash", "k": 2, "table": "bigram"},
    "hash_multihash": {"kind": "hash", "k": 2, "table": "multihash"},
}
"""By name: a ``router:`` section for four experts."""

NOT_FOR_TEXT: set[str] = set()
"""Those that read what a text model does not have, such as a task."""
