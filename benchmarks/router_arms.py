"""The routers that benchmarks/routers.py compares: overrides of its configuration."""


def arm(section: str, one_wide_expert: bool = False) -> list[str]:
    """Return the overrides of a router; ``one_wide_expert`` for those with k = 1."""
    width = ["model.moe.d_expert=512"] if one_wide_expert else []
    return [f"model.moe.router={{{section}}}", *width]


ARMS = {
    "topk": arm("kind: topk, k: 2, balance_loss: 0.01, z_loss: 0.001"),
    "topk, pre-gated": arm("kind: topk, k: 2, lookahead: previous_block"),
    "topk, pre-attention": arm("kind: topk, k: 2, lookahead: attention_input"),
    "topk, sigmoid and bias": arm(
        "kind: topk, k: 2, score: sigmoid, bias_update_rate: 0.003, balance_loss: 0"
    ),
    "topk, softmax and bias": arm(
        "kind: topk, k: 2, score: softmax, bias_update_rate: 0.0003, balance_loss: 0"
    ),
    "topk, quantiles": arm(
        "kind: topk, k: 2, score: sigmoid, bias_update: quantile, bias_update_rate: 1, "
        "balance_loss: 0"
    ),
    "topk, capacity": arm(
        "kind: topk, k: 2, balance_loss: 0.01, z_loss: 0.001, capacity: {factor: 1.25}"
    ),
    "topk, local search": arm(
        "kind: local_search, search_steps: 50, "
        "router: {kind: topk, k: 2, balance_loss: 0.01, z_loss: 0.001}"
    ),
    "noisy, Shazeer": arm("kind: noisy, k: 2"),
    "noisy, GShard": arm(
        "kind: noisy, k: 2, noise: none, importance_loss: 0, load_loss: 0, second_expert: random, "
        "balance_loss: 0.01, balance_counts: first, capacity: {factor: 1.25}"
    ),
    "noisy, Switch": arm(
        "kind: noisy, k: 1, noise: none, importance_loss: 0, load_loss: 0, renormalize: false, "
        "jitter: 0.01, balance_loss: 0.01, capacity: {factor: 1.25}",
        one_wide_expert=True,
    ),
    "noisy, V-MoE": arm(
        "kind: noisy, k: 2, noise: constant, renormalize: false, importance_loss: 0.005, "
        "load_loss: 0.005, capacity: {factor: 1.05, drop: batch_priority, rounding: up}"
    ),
    "top-p": arm("kind: top_p, k: 2, p: 0.3"),
    "relu": arm("kind: relu, k: 2"),
    "cosine": arm("kind: cosine, k: 2, renormalize: true"),
    "topk, ReGLU experts": [
        *arm("kind: topk, k: 2, balance_loss: 0.01, z_loss: 0.001"),
        "model.moe.activation=reglu",
    ],
    "sparsity, ReGLU experts": [
        *arm("kind: sparsity, k: 2"),
        "model.moe.activation=reglu",
    ],
    "hash, balanced": arm("kind: hash, k: 2"),
    "hash, random": arm("kind: hash, k: 2, table: random"),
    "hash, bigram": arm("kind: hash, k: 2, table: bigram"),
    "hash, multihash": arm("kind: hash, k: 2, table: multihash"),
    "k-means, online": arm("kind: kmeans, k: 2, update_rate: 0.01, reseed_after: 20"),
    "null experts": arm("kind: null_experts, k: 4, num_null: 8"),
    "stochastic, mean of all": arm("kind: stochastic", one_wide_expert=True),
    "comet": arm("kind: comet, k: 2, gamma: 10.0, importance_loss: 0.01"),
    "dselect": arm("kind: dselect, k: 2, gamma: 10.0, importance_loss: 0.01"),
    "comet, pre-gated": arm(
        "kind: comet, k: 2, gamma: 10.0, importance_loss: 0.01, lookahead: previous_block"
    ),
    "dense to sparse": arm(
        "kind: dense_to_sparse, k: 2, decay_steps: 75, last_temperature: 0.3, hard_after: 100"
    ),
    "expert choice": arm("kind: expert_choice, k: 2"),
    "expert choice, mutual": arm("kind: expert_choice, k: 2, choice: mutual"),
    "base": arm("kind: base", one_wide_expert=True),
    "sinkhorn": arm("kind: sinkhorn, k: 2"),
    "comet, local search": arm(
        "kind: local_search, search_steps: 50, "
        "router: {kind: comet, k: 2, gamma: 10.0, importance_loss: 0.01}"
    ),
    "dselect, local search": arm(
        "kind: local_search, search_steps: 50, "
        "router: {kind: dselect, k: 2, gamma: 10.0, importance_loss: 0.01}"
    ),
}
"""By name in the table."""

OVERHEAD = {
    "topk": {"kind": "topk", "k": 2},
    "topk, sigmoid, bias": {"kind": "topk", "k": 2, "score": "sigmoid", "bias_update_rate": 1e-3},
    "topk, quantiles": {
        "kind": "topk",
        "k": 2,
        "score": "sigmoid",
        "bias_update": "quantile",
        "bias_update_rate": 0.5,
    },
    "topk, capacity": {"kind": "topk", "k": 2, "capacity": {"factor": 1.25}},
    "noisy": {"kind": "noisy", "k": 2},
    "noisy, GShard": {
        "kind": "noisy",
        "k": 2,
        "noise": "none",
        "second_expert": "random",
        "importance_loss": 0,
        "load_loss": 0,
        "balance_loss": 0.01,
        "capacity": {"factor": 1.25},
    },
    "top_p": {"kind": "top_p", "k": 2, "p": 0.05},
    "relu": {"kind": "relu", "k": 2},
    "cosine": {"kind": "cosine", "k": 2},
    "kmeans": {"kind": "kmeans", "k": 2},
    "null_experts": {"kind": "null_experts", "k": 2, "num_null": 8},
    "sparsity": {"kind": "sparsity", "k": 2},
    "hash": {"kind": "hash", "k": 2, "table": "random"},
    "hash, bigram": {"kind": "hash", "k": 2, "table": "bigram"},
}
"""The token-choice routers of benchmarks/router_overhead.py, for 64 experts."""
