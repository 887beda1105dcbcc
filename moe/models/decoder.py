"""A sparse decoder on flat, ragged batches.

T tokens, D model width, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.experts import Backend
from ..attention.backend import backends, run_attention
from ..attention.grouped_query import Attention
from ..attention.latent import LatentAttention
from ..attention.parts import Part, parts_of
from ..attention.rope import Rope
from ..batch import Batch
from ..config.model import ModelConfig
from ..gated_mlp import GatedMLP
from ..kv_cache import SequenceCache
from ..layer import MoELayer
from ..linear import Linear
from ..norm import RMSNorm
from ..routers.draws import sequence_keys
from ..routers.router import Router
from ..routers.routing import Lookahead, RouterInput, Routing


@dataclass(slots=True)
class DecoderOutput:
    """The result of a forward."""

    hidden_TD: Tensor
    """Rows after the final norm."""
    routings: list[Routing] = field(default_factory=list)
    """One per MoE layer, in order."""


class DecoderLayer(nn.Module):
    """Attention and an MLP or MoE layer, each behind a norm and inside a residual.

    Routers run where their look-ahead says, and choices are announced to the experts immediately.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        token_counts: Sequence[int] | None = None,
        recompute_experts: bool = False,
        token_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.self_attn: Attention | LatentAttention
        if config.attention.latent is None:
            self.self_attn = Attention(config, layer)
        else:
            self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.mlp: MoELayer | GatedMLP
        if config.moe is not None and config.is_moe(layer):
            self.mlp = MoELayer(
                config.d_model,
                config.moe.d_expert,
                config.moe.num_experts,
                config.router(layer),
                config.moe.activation,
                config.moe.d_shared,
                shared_gate=config.moe.shared_gate,
                expert_bias=config.moe.expert_bias,
                vocab_size=config.vocabulary,
                layer=layer,
                token_counts=token_counts,
                expert_ids=expert_ids,
                backend=backend,
                recompute=recompute_experts,
                token_embeddings=token_embeddings,
            )
        else:
            assert config.d_ff is not None, "the configuration was not validated"
            self.mlp = GatedMLP(config.d_model, config.d_ff)
        self._attention_backends = backends(layer, config.rms_eps)

    def forward(
        self,
        x_TD: Tensor,
        batch: Batch,
        parts: Sequence[Part],
        routing: Routing | None,
        following: tuple[int, MoELayer] | None,
    ) -> tuple[Tensor, Routing | None, Routing | None]:
        """Return the residual stream after this layer, its routing and that of ``following``.

        ``routing`` is this layer's choice if it was made earlier. ``following`` is the next MoE
        layer and its index, if its router reads what this layer's experts read (pre-gating).
        """
        if isinstance(self.mlp, MoELayer) and self.mlp.lookahead is Lookahead.ATTENTION_INPUT:
            routing = _choose(self.layer, self.mlp, x_TD, batch)
            self.mlp.experts.announce(routing)
        x_TD, mlp_input_TD = run_attention(self._attention_backends, self._modules, x_TD, parts)
        if isinstance(self.mlp, GatedMLP):
            return x_TD + self.mlp(mlp_input_TD), None, None
        if routing is None:
            routing = _choose(self.layer, self.mlp, mlp_input_TD, batch)
        next_routing = None
        if following is not None:
            next_routing = _choose(*following, mlp_input_TD, batch)
            self.mlp.experts.keep(routing)  # prefetching the next layer's must not evict them
            following[1].experts.announce(next_routing)
        y_TD, routing = self.mlp(mlp_input_TD, routing=routing)
        return x_TD + y_TD, routing, next_routing


def _choose(index: int, layer: MoELayer, x_TD: Tensor | None, batch: Batch) -> Routing:
    """Return the choice of decoder layer ``index``, or replay the one that the batch has for it."""
    router_input = RouterInput(
        x_TD,
        batch.ids_T,
        batch.positions_T,
        lengths=batch.lengths,
        tasks_T=batch.tasks_T,
        timesteps_T=batch.timesteps_T,
        draw_keys=batch.draw_keys,
        previous_ids_T=batch.previous_ids_T,
    )
    if batch.routes is None:
        return layer.gate.route(router_input)
    return layer.gate.route_to(router_input, batch.routes[index])


class Decoder(nn.Module):
    """Token ids in, hidden rows and routings out; ``logits`` turns rows into scores.

    ``expert_ids`` are the experts this process holds (None = all). ``recompute`` drops each
    layer's activations in training and computes them again in backward; routings leave the
    recomputed region as outputs, so they are counted once. ``"experts"`` does so only with the
    experts' pre-activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        token_counts: Sequence[int] | None = None,
        recompute: bool | Literal["experts"] = False,
        token_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute is True
        self.embed_tokens = nn.Embedding(config.vocabulary, config.d_model)
        facts = (token_counts, recompute == "experts", token_embeddings)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, expert_ids, backend, *facts)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.d_model, config.rms_eps)
        self.lm_head = Linear(config.d_model, config.vocabulary)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._rope = Rope.of(config)
        self._reads_previous_ids = any(r.config.reads_previous_ids() for r in self.routers())
        self._following = {
            earlier: (index, layer)
            for (earlier, _), (index, layer) in itertools.pairwise(self.moe_layers())
            if layer.lookahead is Lookahead.PREVIOUS_BLOCK
        }
        """By MoE layer: the next one, if its router reads what this one's experts read."""

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """Return (layer index, MoE layer) of every MoE layer."""
        found = []
        for index, layer in enumerate(self._decoder_layers()):
            if isinstance(layer.mlp, MoELayer):
                found.append((index, layer.mlp))
        return found

    def routers(self) -> list[Router]:
        """Return the routers, one per MoE layer."""
        return [layer.gate for _, layer in self.moe_layers()]

    def new_cache(self, max_length: int | None = None) -> SequenceCache:
        """Return an empty cache for one sequence."""
        specs = [layer.self_attn.cache_spec() for layer in self._decoder_layers()]
        device = self.embed_tokens.weight.device
        return SequenceCache(specs, max_length or self.config.max_positions, device)

    def forward(self, batch: Batch) -> DecoderOutput:
        """Run the decoder on a batch; its caches, if any, grow by the batch's rows."""
        if self.training and any(router.config.draws() for router in self.routers()):
            batch = replace(batch, draw_keys=sequence_keys(batch.ids_T, batch.lengths))
        if self._reads_previous_ids:
            batch = batch.with_previous_ids()
        x_TD = self.embed_tokens(batch.ids_T)
        parts = parts_of(batch, self._rope.tables(batch.positions_T, x_TD.dtype))
        early = self._route_from_tokens(batch)
        routings = []
        for index, layer in enumerate(self._decoder_layers()):
            following = self._following.get(index)
            arguments = (x_TD, batch, parts, early.get(index), following)
            if self.recompute and self.training:
                outputs = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                outputs = layer(*arguments)
            x_TD, routing, next_routing = outputs
            if routing is not None:
                routings.append(routing)
            if following is not None and next_routing is not None:
                early[following[0]] = next_routing
        batch.advance_caches()
        return DecoderOutput(self.norm(x_TD), routings)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return scores over the vocabulary, ``[T, V]``."""
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV

    def _decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def _route_from_tokens(self, batch: Batch) -> dict[int, Routing]:
        """Return, by layer, the choices that token ids alone decide."""
        early = {}
        for index, layer in self.moe_layers():
            if layer.lookahead is Lookahead.TOKEN:
                early[index] = _choose(index, layer, None, batch)
                layer.experts.announce(early[index])
        return early
