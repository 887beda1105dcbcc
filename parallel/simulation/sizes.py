"""Parameters of a model: those of its dense part, of its routers and of its experts.

D model width, F expert width, E experts, V vocabulary.
"""

from dataclasses import dataclass

from ...moe.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of the whole model."""

    layers: tuple[int, ...]
    """By decoder layer: dense parameters, shared experts included, routers not."""
    router: int
    """Of one MoE layer, with a linear router."""
    expert: int
    """Of one expert."""
    embedding: int
    head: int
    """0 where it shares the embedding's weights."""
    last_norm: int
    num_moe_layers: int
    num_experts: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Sizes":
        """Count the parameters of a model."""
        moe, width, vocabulary = model.moe, model.d_model, model.vocabulary
        router = expert = num_experts = 0
        if moe is not None:
            num_experts = moe.num_experts
            expert = moe.matrices * width * moe.d_expert
            if moe.expert_bias:
                expert += moe.fc1_rows + width
            if moe.router.learns:
                router = width * num_experts
        return cls(
            layers=tuple(dense_parameters(model, layer) for layer in range(model.num_layers)),
            router=router,
            expert=expert,
            embedding=vocabulary * width,
            head=0 if model.tie_embeddings else vocabulary * width,
            last_norm=width,
            num_moe_layers=len(model.moe_layers),
            num_experts=num_experts,
        )

    @property
    def routers(self) -> int:
        """Of all routers."""
        return self.num_moe_layers * self.router

    @property
    def experts(self) -> int:
        """Of all experts."""
        return self.num_moe_layers * self.num_experts * self.expert

    @property
    def dense(self) -> int:
        """All but experts and routers."""
        return sum(self.layers) + self.embedding + self.head + self.last_norm

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.dense + self.routers + self.experts

    def active(self, model: ModelConfig) -> int:
        """Those that one token uses."""
        chosen = 0 if model.moe is None else self.experts * model.moe.router.k // self.num_experts
        return self.dense + self.routers + chosen


def dense_parameters(model: ModelConfig, layer: int) -> int:
    """Return the dense parameters of a layer: attention, norms, and its MLP or shared expert."""
    width, moe = model.d_model, model.moe
    total = 2 * width + attention_weights(model) + _attention_vectors(model)
    if not model.is_moe(layer):
        assert model.d_ff is not None, "the configuration was not validated"
        return total + 3 * width * model.d_ff
    assert moe is not None
    return total + moe.matrices * width * moe.d_shared + (width if moe.shared_gate else 0)


def attention_weights(model: ModelConfig) -> int:
    """Return the weights of a layer's projections; a token takes twice as many operations."""
    width, heads, latent = model.d_model, model.num_heads, model.attention.latent
    if latent is None:
        return width * model.head_width * (2 * heads + 2 * model.kv_heads)
    q_width = heads * (latent.nope_dim + latent.rope_dim)
    queries = width * q_width
    if latent.q_rank is not None:
        queries = latent.q_rank * (width + q_width)
    keys = width * (latent.kv_rank + latent.rope_dim)
    keys += latent.kv_rank * heads * (latent.nope_dim + latent.v_dim)
    return queries + keys + heads * latent.v_dim * width


def _attention_vectors(model: ModelConfig) -> int:
    """Return the parameters of a layer's norms and biases in attention."""
    attention, width, heads = model.attention, model.d_model, model.num_heads
    total = width if attention.o_bias else 0
    latent = attention.latent
    if latent is not None:
        q_rank, inner = latent.q_rank or 0, latent.kv_rank + latent.rope_dim
        return total + q_rank + latent.kv_rank + (q_rank + inner if attention.qkv_bias else 0)
    q_width, kv_width = heads * model.head_width, model.kv_heads * model.head_width
    if attention.qkv_bias:
        total += q_width + 2 * kv_width
    if attention.qk_norm is not None:
        is_per_head = attention.qk_norm == "head"
        total += 2 * model.head_width if is_per_head else q_width + kv_width
    return total + (heads if attention.sinks else 0)
