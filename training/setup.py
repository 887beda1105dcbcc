"""Build a run's model from its configuration."""

import torch
from torch import Tensor

from ..errors import ConfigError, ModelFileError
from ..kernels.values.activation import fc1_parts
from ..moe.config.model import LayersConfig
from ..moe.experts.inner_slice import InnerSlice
from ..moe.experts.resident import Experts
from ..moe.experts.streamed import ExpertSource, StreamedExperts
from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from ..moe.models.initialize import initialize
from ..moe.models.model import Model
from ..moe.models.options import ModelOptions
from ..moe.models.table import build_model as build
from ..parallel.mesh import Mesh
from .checkpoints.start_from import read_start
from .config import RunConfig
from .data.data import Data
from .data.tokenizer import Tokenizer
from .device import device

EMBEDDINGS = "embed_tokens.weight"
"""The decoder's name of the token embeddings."""


def fill_vocabulary(config: RunConfig, tokenizer: Tokenizer | None) -> LayersConfig:
    """Return the model's configuration with the tokenizer's vocabulary size, if there is one."""
    given = config.model.vocab_size
    if tokenizer is None:
        return config.model
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {given}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "leave it out or raise it."
        )
    return config.model.model_copy(update={"vocab_size": given or tokenizer.vocab_size})


def build_model(
    config: RunConfig,
    model: LayersConfig,
    data: Data,
    mesh: Mesh,
    source: ExpertSource | None = None,
) -> Model:
    """Build this rank's part of the model with initial weights: fp32 and unsharded.

    With a ``source`` the experts stay there, frozen.

    Dense weights are on the CPU. So are experts, unless this rank has a GPU and keeps them whole:
    then they are filled there, because the ranks of a host may have more of them than it has
    memory. parallelize.py then makes the model ready to train.
    """
    expert_ids, token_counts, token_embeddings = None, None, None
    if model.moe is not None:
        expert_ids = mesh.local_experts(model.moe.num_experts)
        if model.moe.router.needs_token_counts:
            token_counts = data.train.token_counts()
            token_counts += [0] * (model.vocabulary - len(token_counts))
        token_embeddings = _read_embeddings(model.moe.router.embeddings_folder())
    here = device()
    is_apart = source is not None or (here.type != "cpu" and mesh.expert_tp_size == 1)
    options = ModelOptions(
        expert_ids=() if is_apart else expert_ids,
        backend=config.parallel.backend,
        token_counts=token_counts,
        recompute=config.train.recompute,
        token_embeddings=token_embeddings,
        stage=mesh.local_layers(model.num_layers),
    )
    decoder = build(model, options)
    if source is not None:
        moe = model.moe
        assert moe is not None, "config.py checks it"
        shape = (moe.num_experts, model.d_model, moe.d_expert, moe.activation)
        keeps_x_only = config.train.recompute == "experts"
        for index, layer in decoder.moe_layers():
            layer.experts = StreamedExperts(source, index, *shape, keeps_x_only)
    elif is_apart and expert_ids is not None:
        for _, layer in decoder.moe_layers():
            assert isinstance(layer.experts, Experts), "training has its experts in memory"
            layer.experts = layer.experts.like(len(expert_ids), here)
            layer.experts.hold(expert_ids)
    if config.start_from is None:
        initialize(decoder, config.seed)
    else:
        read_start(config.start_from, decoder, config.ignore_unused_weights, config.seed)
    if mesh.expert_tp_size > 1:
        for _, layer in decoder.moe_layers():
            assert isinstance(layer.experts, Experts), "training has its experts in memory"
            parts = len(fc1_parts(layer.experts.activation))
            layer.experts.keep_slice(InnerSlice(mesh.expert_tp_rank, mesh.expert_tp_size, parts))
    return decoder


def _read_embeddings(name: str | None) -> Tensor | None:
    """Return the token embeddings of a model folder in fp32."""
    if name is None:
        return None
    try:
        folder = ModelFolder(local_folder(name))
        try:
            _, shape = folder.stored(EMBEDDINGS)
            embeddings_VD = torch.empty(shape)
            folder.read_into(EMBEDDINGS, embeddings_VD)
        finally:
            folder.close()
    except ModelFileError as error:
        raise ConfigError(f"router.embeddings is {name!r}, which cannot be used: {error}") from None
    return embeddings_VD


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Refuse a global batch that does not split evenly."""
    pieces = mesh.dp_size * config.train.accumulation
    of_stage = " of each stage" if mesh.pp_size > 1 else ""
    if config.train.batch_sequences % pieces:
        raise ConfigError(
            f"train.batch_sequences is {config.train.batch_sequences}, which does not split over "
            f"{mesh.dp_size} ranks{of_stage} times train.accumulation = "
            f"{config.train.accumulation}; "
            f"use a multiple of {pieces}."
        )
