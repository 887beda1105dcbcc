"""A sparse decoder on flat, ragged batches.

T tokens, D model width, V vocabulary.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ...kernels.experts import Backend
from ..attention.parts import parts_of
from ..attention.rope import Rope
from ..batch import Batch
from ..blocks.block import State
from ..config.model import ModelConfig
from ..experts.core_channels import CoreChannels, CoreMode
from ..kv_cache import SequenceCache
from ..linear import Linear
from ..norm import RMSNorm
from ..routers.router import Router
from ..routers.routing import Lookahead, Routing
from .decoder_layer import DecoderLayer
from .model import Model, ModelOutput
from .options import ModelOptions
from .routed import choose
from .stage_rows import StageRows, carries_gate_rows, num_state_tensors


@dataclass(slots=True)
class DecoderOutput(ModelOutput):
    """The result of a forward.

    Rows are those after the final norm; the residual stream if the last layer is in another stage.
    """

    gate_TD: Tensor | None = None
    """See :class:`StageRows`; None unless the next stage needs it."""
    state: State = ()
    """See :class:`StageRows`; empty unless the next stage needs it."""

    def for_next_stage(self) -> StageRows:
        """Return what the next stage goes on with."""
        return StageRows(self.hidden_TD, self.gate_TD, self.state)


class Decoder(Model):
    """Token ids in, hidden rows and routings out; ``logits`` turns rows into scores.

    ``expert_ids`` are the experts this process holds (None = all). ``recompute`` drops each
    layer's activations in training and computes them again in backward; routings leave the
    recomputed region as outputs, so they are counted once. ``"experts"`` does so only with the
    experts' pre-activations.

    ``stage`` are the neighbouring layers this process holds (None = all). Those of other stages
    have no parameters here. The first stage has the embeddings, the last one the norm and the head,
    and tied embeddings too. Names of parameters are those of the whole model.
    """

    config: ModelConfig
    norm: RMSNorm
    lm_head: Linear

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        token_counts: Sequence[int] | None = None,
        recompute: bool | Literal["experts"] = False,
        token_embeddings: Tensor | None = None,
        stage: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute is True
        self.stage = range(config.num_layers) if stage is None else stage
        if self.stage.start == 0 or (self.has_last_layer and config.tie_embeddings):
            self.embed_tokens = nn.Embedding(config.vocabulary, config.d_model)
        options = ModelOptions(expert_ids, backend, token_counts, recompute, token_embeddings)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, options) if layer in self.stage else nn.Identity()
            for layer in range(config.num_layers)
        )
        if self.has_last_layer:
            self.norm = RMSNorm(config.d_model, config.rms_eps)
            self.lm_head = Linear(config.d_model, config.vocabulary)
            self.tie()
        self.core: CoreMode | None = None
        """That answers use core channels of experts; None = they use all."""
        self._rope = Rope.of(config)
        self._reads_previous_ids = any(r.config.reads_previous_ids() for r in self.routers())
        self._connect()

    def _connect(self) -> None:
        """Find out what passes between the layers here, and from and to other stages."""
        self._following = {
            earlier: (index, layer)
            for (earlier, _), (index, layer) in itertools.pairwise(self.moe_layers())
            if layer.lookahead is Lookahead.PREVIOUS_BLOCK
        }
        """By MoE layer: the next one, if its router reads what this one's experts read."""
        moe_layers = self.moe_layers()
        takes_rows = carries_gate_rows(self.config, self.stage.start)
        self._reads_before = moe_layers[0] if takes_rows and moe_layers else None
        """The MoE layer whose router reads what experts of an earlier stage read, and its index."""
        self._gives_rows = carries_gate_rows(self.config, self.stage.stop)
        self._read_later = moe_layers[-1][0] if self._gives_rows and moe_layers else None
        """The MoE layer whose experts' input the router of a later stage reads."""
        self._gives_state = num_state_tensors(self.config, self.stage.stop) > 0

    @property
    def has_last_layer(self) -> bool:
        """Whether the last layer is here, and so the norm and the head."""
        return self.stage.stop == self.config.num_layers

    def part(self, stage: range) -> "Decoder":
        """Return some neighbouring layers as a stage that shares this decoder's modules.

        Its forward is that of a stage: one layer after the other computes what all together do.
        """
        found = copy.copy(self)
        found._modules = dict(self._modules)  # a copy shares the dictionary
        found.stage = stage
        layers = [layer if i in stage else nn.Identity() for i, layer in enumerate(self.layers)]
        found.layers = nn.ModuleList(layers)
        found._connect()
        return found

    def tie(self) -> None:
        """See :meth:`Model.tie`."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def routed_layers(self) -> list[tuple[int, Router]]:
        """See :meth:`Model.routed_layers`: MoE layers, and dense layers with LoRA experts."""
        pairs = [(layer.layer, layer.mlp.gate) for layer in self._decoder_layers()]
        return [(index, gate) for index, gate in pairs if gate is not None]

    def new_cache(self, max_length: int | None = None) -> SequenceCache:
        """Return an empty cache for one sequence."""
        specs = [layer.self_attn.cache_spec() for layer in self._decoder_layers()]
        return SequenceCache(specs, max_length or self.config.max_positions, self.device)

    def new_core(self, num_prompt: int) -> CoreChannels | None:
        """Return what becomes the core channels of a text; None where answers use all."""
        return None if self.core is None else CoreChannels(self.core, num_prompt)

    def forward(self, batch: Batch, before: StageRows | None = None) -> DecoderOutput:
        """Run the decoder on a batch; its caches, if any, grow by the batch's rows.

        ``before`` is what the stage before computed for the batch; None in the first stage.
        """
        batch = self.with_draw_keys(batch)
        if self._reads_previous_ids:
            batch = batch.with_previous_ids()
        rows = StageRows(self.embed_tokens(batch.ids_T)) if before is None else before
        x_TD, gate_TD, state = rows
        parts = parts_of(batch, self._rope.tables(batch.positions_T, x_TD.dtype))
        early = self.route_from_tokens(batch) | self._route_from_before(gate_TD, batch)
        routings = []
        for layer in self._decoder_layers():
            index = layer.layer
            following = self._following.get(index)
            is_read = index == self._read_later
            output = self.run_layer(
                layer, x_TD, state, batch, parts, early.get(index), following, is_read
            )
            x_TD, state = output.x_TD, output.state
            if output.routing is not None:
                routings.append(output.routing)
            if following is not None and output.next_routing is not None:
                early[following[0]] = output.next_routing
            if output.mlp_input_TD is not None:
                gate_TD = output.mlp_input_TD
        batch.advance_caches()
        if self.has_last_layer:
            x_TD = self.norm(x_TD)
        given_TD = gate_TD if self._gives_rows else None
        return DecoderOutput(x_TD, routings, given_TD, state if self._gives_state else ())

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return scores over the vocabulary, ``[T, V]``."""
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV

    def _decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            if isinstance(layer, DecoderLayer):
                yield layer

    def _route_from_before(self, gate_TD: Tensor | None, batch: Batch) -> dict[int, Routing]:
        """Return the choice of a router that reads what experts of an earlier stage read."""
        if self._reads_before is None:
            return {}
        index, layer = self._reads_before
        return {index: choose(index, layer, gate_TD, batch)}
