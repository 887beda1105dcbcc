"""Build what a run needs from its configuration."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..moe.config.model import ModelConfig
from ..moe.models.decoder import Decoder
from ..moe.models.initialize import initialize
from ..moe.models.lora import add_lora
from ..parallel.dense.fsdp import modules_kept_whole, sharded_parameter_names
from ..parallel.experts.all_to_all import AllToAllPath
from ..parallel.experts.exchange import open_exchange
from ..parallel.mesh import Mesh
from .checkpoints.start_from import check_tokenizer, read_start
from .config import RunConfig
from .data.batches import Batches, GlobalBatches
from .data.corpus import open_eval_shard, open_shards, prepare_shards
from .data.stream import StreamBatches
from .data.stream_setup import is_stream, prepare_stream, stream_identity
from .data.tokenizer import Tokenizer, open_tokenizer
from .precision import apply_precision
from .run.stop import StopRequest


@dataclass(frozen=True, slots=True)
class Data:
    """Tokens of a run."""

    tokenizer: Tokenizer
    train: Batches
    identity: str
    """Hash of what is trained on; a run goes on with the same."""
    num_train_tokens: int | None
    """None for a stream."""
    held_out: GlobalBatches
    held_out_identity: str
    tokens_per_byte: float
    """Of the held-out text: turns nats per token into nats per byte."""


def build_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> Data:
    """Prepare the data on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all when rank 0 is asked to stop meanwhile.
    """
    stop = stop or StopRequest()
    tokenizer = open_tokenizer(config.data.tokenizer)
    if config.start_from is not None:
        check_tokenizer(config.start_from, config.data.tokenizer, tokenizer)
    streams = is_stream(config.data.source)

    def prepare() -> None:
        if streams:
            prepare_stream(config, tokenizer, folder, stop)
            open_eval_shard(config.data, tokenizer, folder, verify=True)
        else:
            prepare_shards(config.data, tokenizer, folder, stop)
            open_shards(config.data, tokenizer, folder, verify=True)

    mesh.on_rank_0(prepare)
    length, batch = config.train.sequence_length, config.train.batch_sequences
    train: Batches
    if streams:
        eval_shard = open_eval_shard(config.data, tokenizer, folder, verify=False)
        train = StreamBatches(config, tokenizer, folder, mesh, stop)
        identity, num_tokens = stream_identity(folder), None
    else:
        shard, eval_shard = open_shards(config.data, tokenizer, folder, verify=False)
        train = GlobalBatches(shard, length, batch, config.seed, "training")
        identity, num_tokens = shard.facts.file_sha256, len(shard)
    return Data(
        tokenizer=tokenizer,
        train=train,
        identity=identity,
        num_train_tokens=num_tokens,
        held_out=GlobalBatches(eval_shard, length, batch, config.seed, "held-out"),
        held_out_identity=eval_shard.facts.file_sha256,
        tokens_per_byte=eval_shard.facts.num_tokens / eval_shard.facts.num_bytes,
    )


def fill_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the model's configuration with the tokenizer's vocabulary size."""
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {given}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "leave it out or raise it."
        )
    return config.model.model_copy(update={"vocab_size": given or tokenizer.vocab_size})


def build_model(
    config: RunConfig, model: ModelConfig, data: Data, mesh: Mesh
) -> tuple[Decoder, dict[str, Tensor]]:
    """Build this rank's part of the decoder, with initial weights and expert paths.

    Returns it with the fp32 masters of the parameters that its precision narrows. Parameters that
    will be sharded are still whole and on the CPU (parallel/dense/fsdp.py). The global
    generator is seeded last: from here on only router noise draws from it.
    """
    expert_ids, token_counts = None, None
    if model.moe is not None:
        expert_ids = mesh.local_experts(model.moe.num_experts)
        if model.moe.router.needs_token_counts:
            token_counts = data.train.token_counts()
            token_counts += [0] * (model.vocabulary - len(token_counts))
    decoder = Decoder(
        model,
        expert_ids=expert_ids,
        backend=config.parallel.backend,
        token_counts=token_counts,
        recompute=config.train.recompute,
    )
    if config.start_from is None:
        initialize(decoder, config.seed)
    else:
        read_start(config.start_from, decoder, config.ignore_unused_weights)
    _choose_trained(config, decoder)
    if shards_dense(config, mesh):
        for module in modules_kept_whole(decoder):  # the others when they are sharded
            module.to(device())
        sharded = sharded_parameter_names(decoder)
        masters = apply_precision(decoder, config.train.precision, sharded)
    else:
        decoder.to(device())
        masters = apply_precision(decoder, config.train.precision)
    if mesh.ep_group is not None and mesh.ep_size > 1 and model.moe is not None:
        exchange = open_exchange(mesh.ep_group, mesh.ep_host)
        for _, layer in decoder.moe_layers():
            layer.path = AllToAllPath(model.moe.num_experts, mesh, exchange)
    seed_rank(config.seed, mesh.rank)
    return decoder, masters


def _choose_trained(config: RunConfig, decoder: Decoder) -> None:
    """Freeze what ``train.parameters`` leaves out, and add low-rank updates if it asks for them."""
    if config.train.parameters == "router":
        decoder.requires_grad_(False)
        for router in decoder.routers():
            router.requires_grad_(True)
    elif config.lora is not None:
        lora = config.lora
        add_lora(decoder, lora.rank, lora.alpha, lora.targets, config.seed)


def shards_dense(config: RunConfig, mesh: Mesh) -> bool:
    """Say whether dense parameters are sharded: asked for, and there is a process group."""
    return config.parallel.dense == "fsdp" and mesh.dp_group is not None


def device() -> torch.device:
    """Return where this rank computes: its GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Refuse a global batch that does not split evenly."""
    pieces = mesh.world_size * config.train.accumulation
    if config.train.batch_sequences % pieces:
        raise ConfigError(
            f"train.batch_sequences is {config.train.batch_sequences}, which does not split over "
            f"{mesh.world_size} ranks times train.accumulation = {config.train.accumulation}; "
            f"use a multiple of {pieces}."
        )


def seed_rank(seed: int, rank: int) -> None:
    """Seed the global generator, which only router noise draws from."""
    digest = hashlib.sha256(f"{seed}/rank{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
