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
    "task": {"kind": "task", "k": 2, "num_tasks": 2},
    "task_vector": {"kind": "task", "k": 2, "num_tasks": 2, "form": "vector", "d_task": 6},
    "timestep": {"kind": "timestep"},
    "stochastic": {"kind": "stochastic"},
    "stochastic_sequence": {"kind": "stochastic", "k": 2, "drawn_per": "sequence"},
    "stochastic_fixed": {"kind": "stochastic", "k": 2, "evaluation": "fixed"},
    "kmeans": {"kind": "kmeans", "k": 2},
    "kmeans_farthest": {"kind": "kmeans", "k": 2, "choose": "farthest", "balance_loss": 0},
    "kmeans_online": {"kind": "kmeans", "update_rate": 0.1, "reseed_after": 2},
    "null_experts": {"kind": "null_experts", "k": 2, "num_null": 3},
    "null_experts_keep_weight": {"kind": "null_experts", "k": 3, "renormalize_over": "all"},
}
"""By name: a ``router:`` section for four experts."""

NOT_FOR_TEXT: set[str] = {"task", "task_vector", "timestep"}
"""Those that read what a text model does not have, such as a task."""

NOT_TENSORS_ALONE: set[str] = set()
"""Those with a fixed number of experts whose rule needs values on the host."""
