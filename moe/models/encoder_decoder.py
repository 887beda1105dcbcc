"""An encoder-decoder on flat, ragged batches: T5's, with experts in any layer.

T target rows, S source rows, D model width, V vocabulary, B sequences of padded length L.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..attention.grid import Grid, grid_of
from ..attention.relative import Meeting, hide_padding
from ..attention.relative_positions import distance_buckets
from ..batch import Batch
from ..config.encoder_decoder import EncoderDecoderConfig
from ..linear import Linear
from ..norm import RMSNorm
from .encoder_decoder_layer import EncoderDecoderLayer, Sources, StackRows
from .model import ModelOutput, WholeModel
from .options import WHOLE, ModelOptions
from .target_caches import TargetCaches


class EncoderDecoder(WholeModel):
    """A source and a target in, the target's hidden rows and routings out.

    ``encode`` and ``decode`` are the two halves of a forward. Each target row sees the rows of its
    own target up to itself, and all rows of its own source; each source row sees its own source.
    ``layers`` has those of ``encode`` first.
    """

    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__(config, options)
        self.embed_tokens = nn.Embedding(config.vocabulary, config.d_model)
        self.embed_source_distances = nn.Embedding(config.num_buckets, config.num_heads)
        self.embed_target_distances = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList(EncoderDecoderLayer(config, i, options) for i in self.stage)
        self.source_norm = RMSNorm(config.d_model, config.norm_eps)
        self.target_norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocabulary)
        self._reads_previous_ids = any(r.config.reads_previous_ids() for r in self.routers())
        self._hooks: OrderedDict[int, Callable[[Batch], None]] = OrderedDict()

    def forward(self, batches: tuple[Batch, Batch]) -> ModelOutput:
        """Run the model on sources and their targets; routings are those of all layers."""
        source, target = batches
        read = self.encode(source)
        written = self.decode(target, read.hidden_TD, source.lengths)
        return ModelOutput(written.hidden_TD, read.routings + written.routings)

    def before_forwards(self, hook: Callable[[Batch], None]) -> RemovableHandle:
        """See :meth:`Model.before_forwards`: both halves call it, each with its own batch."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def encode(self, source: Batch) -> ModelOutput:
        """Return the hidden rows of sources, and the routings of their layers."""
        grid = grid_of(source.lengths, source.ids_T.device)
        places_L = torch.arange(grid.length, device=source.ids_T.device)
        bias_1QLL = self._bias(self.embed_source_distances, places_L, places_L, True)
        own = Meeting(grid, hide_padding(bias_1QLL, grid.is_real_BL, bias_1QLL))
        layers = range(self.config.num_source_layers)
        output = self._run(layers, StackRows(self._prepared(source), own))
        return replace(output, hidden_TD=self.source_norm(output.hidden_TD))

    def decode(
        self,
        target: Batch,
        source_hidden_SD: Tensor | None,
        source_lengths: tuple[int, ...],
        caches: TargetCaches | None = None,
    ) -> ModelOutput:
        """Return the hidden rows of targets, and the routings of their layers.

        ``target`` has the ids up to the last but one, behind ``start_id``, and a sequence for each
        source. With ``caches`` its rows follow those that were decoded before, the same number for
        each target, and the sources are those of the caches.
        """
        if caches is None:
            assert source_hidden_SD is not None, "without caches, sources are needed"
            assert len(source_lengths) == len(target.lengths), "each target has its own source"
            rows = self._rows(target, source_hidden_SD, source_lengths)
        else:
            rows = self._rows_behind(target, caches)
        layers = range(self.config.num_source_layers, self.config.num_layers)
        output = self._run(layers, rows._replace(first_layer=layers.start))
        if caches is not None:
            caches.advance(target.ids_T.unflatten(0, (caches.num_targets, -1)))
        return replace(output, hidden_TD=self.target_norm(output.hidden_TD))

    def new_caches(
        self,
        source_hidden_SD: Tensor,
        source_lengths: tuple[int, ...],
        targets_per_source: int = 1,
        room: int | None = None,
    ) -> TargetCaches:
        """Return empty caches for targets of up to ``room`` rows (None = ``max_positions``).

        Keys and values of the sources are computed here, once.
        """
        grid = grid_of(source_lengths, source_hidden_SD.device)
        met = []
        for layer in self.layers[self.config.num_source_layers :]:
            assert isinstance(layer, EncoderDecoderLayer), "no layer is in another stage"
            met.append(layer.source_keys_values(source_hidden_SD, grid))
        mask_C11S = hide_padding(None, grid.is_real_BL, source_hidden_SD)
        num_targets = len(source_lengths) * targets_per_source
        return TargetCaches(met, mask_C11S, num_targets, room or self.config.max_positions)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return scores over the vocabulary, ``[T, V]``."""
        if self.config.scale_outputs:
            hidden_TD = hidden_TD * self.config.d_model**-0.5
        if self.config.tie_embeddings:
            return F.linear(hidden_TD, self.embed_tokens.weight)
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV

    def initial_std(self, name: str) -> float | None:
        """See :meth:`Model.initial_std`: T5's values where scores or outputs depend on them."""
        if name == "embed_tokens.weight" and self.config.scale_outputs:
            return 1.0
        if name.endswith("_attn.q_proj.weight"):  # scores are not divided by sqrt(head width)
            return float((self.config.d_model * self.config.head_width) ** -0.5)
        return None

    def _run(self, layers: range, rows: StackRows) -> ModelOutput:
        """Run some neighbouring layers on the tokens of a batch."""
        for hook in self._hooks.values():
            hook(rows.batch)
        early = self.route_from_tokens(rows.batch, layers)
        x_TD = self.embed_tokens(rows.batch.ids_T)
        return self.run_layers(x_TD, lambda index: (rows, early.get(index)), layers)

    def _rows(self, target: Batch, hidden_SD: Tensor, lengths: tuple[int, ...]) -> StackRows:
        """Return what the layers of whole targets share."""
        device = target.ids_T.device
        grid, source_grid = grid_of(target.lengths, device), grid_of(lengths, device)
        bias_1QLL = self._causal_bias(range(grid.length))
        across = Meeting(grid, hide_padding(None, source_grid.is_real_BL, hidden_SD))
        sources = Sources(hidden_SD, source_grid)
        return StackRows(self._prepared(target), Meeting(grid, bias_1QLL), across, sources)

    def _rows_behind(self, target: Batch, caches: TargetCaches) -> StackRows:
        """Return what the layers of targets share that go on."""
        assert target.is_uniform, "targets with caches advance together"
        count, length = caches.num_targets, target.lengths[0]
        bias_1QLS = self._causal_bias(range(caches.length, caches.length + length))
        own = Meeting(Grid(count, length, None, None, None), bias_1QLS)
        rows_of_source = count // caches.num_sources * length
        grid = Grid(caches.num_sources, rows_of_source, None, None, None)
        batch = caches.with_previous_ids(self._prepared(target))
        return StackRows(batch, own, Meeting(grid, caches.mask_C11S), caches=caches)

    def _causal_bias(self, queries: range) -> Tensor:
        """Return ``[1, Q, L, S]``: the bias of distances, and ``-inf`` for keys behind a query."""
        device = self.device
        queries_L = torch.arange(queries.start, queries.stop, device=device)
        keys_S = torch.arange(queries.stop, device=device)
        bias_1QLS = self._bias(self.embed_target_distances, queries_L, keys_S, False)
        return bias_1QLS.masked_fill(keys_S[None, :] > queries_L[:, None], -torch.inf)

    def _bias(
        self, table: nn.Embedding, queries_L: Tensor, keys_S: Tensor, both_directions: bool
    ) -> Tensor:
        sizes = (self.config.num_buckets, self.config.max_distance)
        buckets_LS = distance_buckets(queries_L, keys_S, *sizes, both_directions=both_directions)
        bias_LSQ: Tensor = table(buckets_LS)
        return bias_LSQ.permute(2, 0, 1).unsqueeze(0)

    def _prepared(self, batch: Batch) -> Batch:
        """Return the batch with what routers read of it."""
        batch = self.with_draw_keys(batch)
        return batch.with_previous_ids() if self._reads_previous_ids else batch
