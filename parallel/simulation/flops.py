"""Floating-point operations of a model, forward; a multiplication with its addition is two.

T tokens, L tokens of a sequence, D model width, F inner width, E experts, V vocabulary.
"""

from ...moe.config.model import ModelConfig
from .sizes import attention_weights

BACKWARD = 2.0
"""Products of backward for each of forward: one for the rows' gradient, one for the weights'."""
ATTENTION_BACKWARD = 2.5
"""Queries with keys and weights with values: five products for two, because backward computes the
weights again (FlashAttention-2, Dao 2023, section 3.1)."""


def visible(length: int, window: int | None) -> float:
    """Return how many positions a token sees on average, itself included (causal attention)."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def widths(model: ModelConfig) -> tuple[int, int, int, int]:
    """Return the numbers of a token's queries, keys, values and attention outputs, all heads."""
    latent, heads = model.attention.latent, model.num_heads
    if latent is None:
        own, shared = heads * model.head_width, model.kv_heads * model.head_width
        return own, shared, shared, own
    inner = heads * (latent.nope_dim + latent.rope_dim)
    return inner, inner, heads * latent.v_dim, heads * latent.v_dim


def attention(model: ModelConfig, layer: int, tokens: int, length: int) -> float:
    """Return the operations of queries with keys and of weights with values."""
    q_width, _, _, out_width = widths(model)
    seen = visible(length, model.attention.layer_window(layer))
    return 2 * tokens * seen * (q_width + out_width)


def projections(model: ModelConfig, tokens: int) -> float:
    """Return those of queries, keys, values and the output projection."""
    return 2 * tokens * attention_weights(model)


def gated_mlp(model: ModelConfig, inner: int, rows: float, matrices: int = 3) -> float:
    """Return those of an MLP: three products of D and F, or two without a gate."""
    return 2 * matrices * rows * model.d_model * inner


def router(model: ModelConfig, tokens: int) -> float:
    """Return those of one layer's scores."""
    moe = model.moe
    return 2 * tokens * model.d_model * moe.num_experts if moe and moe.router.learns else 0.0


def head(model: ModelConfig, tokens: int) -> float:
    """Return those of the scores over the vocabulary."""
    return 2 * tokens * model.d_model * model.vocabulary


def model_flops(model: ModelConfig, tokens: int, length: int) -> float:
    """Return the operations of a step that the model needs, for the utilisation (MFU).

    Three times those of forward (PaLM, Chowdhery et al. 2022, appendix B), and nothing that is
    computed again. Attention counts the positions that a token sees.
    """
    total = head(model, tokens)
    moe = model.moe
    for layer in range(model.num_layers):
        total += projections(model, tokens) + attention(model, layer, tokens, length)
        if moe is not None and model.is_moe(layer):
            total += router(model, tokens)
            total += gated_mlp(model, moe.d_expert, tokens * moe.router.k, moe.matrices)
            total += gated_mlp(model, moe.d_shared, tokens, moe.matrices)
        else:
            total += gated_mlp(model, model.d_ff or 0, tokens)
    return 3 * total
