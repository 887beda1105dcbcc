"""An encoder on flat, ragged batches, with a head that classifies each text (BERT's).

T tokens, D model width, B sequences, C labels.
"""

import itertools

import torch
from torch import Tensor, nn

from ..attention.full import full_rows
from ..batch import Batch
from ..config.encoder import EncoderConfig
from ..linear import Linear
from .encoder_layer import EncoderLayer
from .model import ModelOutput, WholeModel
from .options import WHOLE, ModelOptions


class Encoder(WholeModel):
    """Token ids in, hidden rows and routings out; ``logits`` turns sequences into scores.

    Every row sees all rows of its own sequence, and no other. There is no cache. ``embed`` and
    ``encode`` are the two halves of a forward: what embeds something other than tokens calls the
    second one alone.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, options: ModelOptions = WHOLE) -> None:
        super().__init__(config, options)
        self.embed_tokens = nn.Embedding(config.vocabulary, config.d_model)
        self.embed_positions = nn.Embedding(config.max_positions, config.d_model)
        self.embed_types = nn.Embedding(config.num_types, config.d_model)
        self.embed_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        layers = (EncoderLayer(config, index, options) for index in range(config.num_layers))
        self.layers = nn.ModuleList(layers)
        self.pooler = Linear(config.d_model, config.d_model, bias=True)
        if config.labels:
            self.classifier = Linear(config.d_model, len(config.labels), bias=True)
        self._reads_previous_ids = any(r.config.reads_previous_ids() for r in self.routers())

    def forward(self, batch: Batch) -> ModelOutput:
        """Run the encoder on a batch without caches."""
        return self.encode(self.embed(batch), batch)

    def embed(self, batch: Batch) -> Tensor:
        """Return the embedded tokens of a batch, ``[T, D]``."""
        x_TD = self.embed_tokens(batch.ids_T) + self.embed_positions(batch.positions_T)
        normed_TD: Tensor = self.embed_norm(x_TD + self.embed_types.weight[0])
        return normed_TD

    def encode(self, x_TD: Tensor, batch: Batch) -> ModelOutput:
        """Run the layers on embedded rows; ``batch`` says which of them are a sequence."""
        batch = self.with_draw_keys(batch)
        if self._reads_previous_ids:
            batch = batch.with_previous_ids()
        rows = full_rows(batch)
        early = self.route_from_tokens(batch)
        return self.run_layers(x_TD, lambda index: (batch, rows, early.get(index)))

    def pooled(self, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return a row for each sequence, ``[B, D]``: that of its first token, through a layer."""
        starts_B = list(itertools.accumulate(lengths, initial=0))[:-1]
        first_BD = hidden_TD[torch.tensor(starts_B, dtype=torch.int64, device=hidden_TD.device)]
        pooled_BD: Tensor = torch.tanh(self.pooler(first_BD))
        return pooled_BD

    def logits(self, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return scores over the labels, ``[B, C]``; only with ``config.labels``."""
        logits_BC: Tensor = self.classifier(self.pooled(hidden_TD, lengths))
        return logits_BC
