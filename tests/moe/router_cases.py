"""Configurations of every router, for the tests that all routers pass."""

CASES: dict[str, dict] = {
    "topk": {"kind": "topk", "k": 2, "balance_loss": 0.01, "z_loss": 0.001},
    "topk_sigmoid_bias": {"kind": "topk", "k": 2, "score": "sigmoid", "bias_update_rate": 0.01},
    "topk_pregated": {"kind": "topk", "k": 2, "lookahead": "previous_block"},
    "topk_preattention": {"kind": "topk", "k": 1, "lookahead": "attention_input"},
    "topk_capacity": {
        "kind": "topk",
        "k": 2,
        "bias_update_rate": 0.01,
        "entropy_loss": 0.01,
        "capacity": {"factor": 0.75, "drop": "probability"},
    },
    "hash": {"kind": "hash", "k": 1, "table": "random"},
    "hash_balanced": {"kind": "hash", "k": 2},
    "noisy": {"kind": "noisy", "k": 2},
    "noisy_vmoe": {
        "kind": "noisy",
        "k": 2,
        "noise": "constant",
        "renormalize": False,
        "capacity": {"factor": 0.75, "drop": "batch_priority", "rounding": "up"},
    },
    "noisy_gshard": {
        "kind": "noisy",
        "k": 2,
        "noise": "none",
        "second_expert": "random",
        "second_threshold": 0.5,
        "capacity": {"factor": 0.75},
        "importance_loss": 0,
        "load_loss": 0,
        "balance_loss": 0.01,
        "balance_counts": "first",
    },
    "noisy_switch": {
        "kind": "noisy",
        "k": 1,
        "noise": "none",
        "jitter": 0.01,
        "renormalize": False,
        "capacity": {"factor": 1.0},
        "importance_loss": 0,
        "load_loss": 0,
        "balance_loss": 0.01,
    },
    "top_p": {"kind": "top_p", "p": 0.4, "entropy_loss": 0.01},
    "top_p_limited": {"kind": "top_p", "p": 0.7, "max_k": 3, "lookahead": "attention_input"},
    "relu": {"kind": "relu", "k": 1, "l1": 0.01},
    "cosine": {"kind": "cosine"},
    "cosine_code": {
        "kind": "cosine",
        "width": 16,
        "normalize_token": False,
        "temperature": None,
        "renormalize": True,
        "k": 2,
    },
    "comet": {"kind": "comet", "k": 2, "gamma": 0.5, "importance_loss": 0.1},
    "comet_decided": {"kind": "comet", "k": 2, "gamma": 1e-3},
    "dselect": {"kind": "dselect", "k": 2},
    "dselect_static": {"kind": "dselect", "k": 2, "per_token": False},
    "dense_to_sparse": {"kind": "dense_to_sparse"},
    "dense_to_sparse_hard": {"kind": "dense_to_sparse", "k": 2, "hard_after": 1, "seed": 3},
    "dense_to_sparse_activation": {
        "kind": "dense_to_sparse",
        "noise": False,
        "activation": "gelu",
        "threshold": 0.2,
        "dense_evaluation": True,
    },
    "expert_choice": {"kind": "expert_choice", "k": 2},
    "expert_choice_group": {"kind": "expert_choice", "k": 1, "evaluation": "group"},
    "mutual_choice": {"kind": "expert_choice", "choice": "mutual", "score": "sigmoid"},
    "base": {"kind": "base"},
    "sinkhorn": {"kind": "sinkhorn"},
    "sinkhorn_k2": {"kind": "sinkhorn", "k": 2},
    "local_search": {"kind": "local_search", "router": {"kind": "comet"}, "search_steps": 50},
    "local_search_done": {"kind": "local_search", "router": {"kind": "topk"}, "search_steps": 1},
    "local_search_of_hash": {"kind": "local_search", "router": {"kind": "hash"}, "search_steps": 2},
}
"""By name: a ``router:`` section for four experts."""

NOT_FOR_TEXT: set[str] = set()
"""Those that read what a text model does not have, such as a task."""

NOT_TENSORS_ALONE: set[str] = set()
"""Those with a fixed number of experts whose rule needs values on the host."""
