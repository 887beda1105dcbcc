"""The text of a run: tokenizer, training windows and held-out windows."""

from dataclasses import dataclass
from pathlib import Path

from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..stop import StopRequest
from .batches import Batches, GlobalBatches
from .corpus import open_eval_shard, open_shards, prepare_shards
from .data import Data
from .stream import StreamBatches
from .stream_setup import is_stream, prepare_stream, stream_identity
from .tokenizer import check_tokenizer, open_tokenizer


@dataclass(frozen=True, slots=True)
class TextData(Data):
    """Windows of text."""

    train: Batches
    held_out: GlobalBatches
    tokens_per_byte: float
    """Of the held-out text; converts nats per token into nats per byte."""


def build_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> TextData:
    """Prepare the data on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop.
    """
    stop = stop or StopRequest()
    tokenizer = open_tokenizer(config.text_data.tokenizer)
    if config.start_from is not None:
        check_tokenizer(config.start_from, config.text_data.tokenizer, tokenizer)
    streams = is_stream(config.text_data.source)

    def prepare() -> None:
        if streams:
            prepare_stream(config, tokenizer, folder, stop)
            open_eval_shard(config.text_data, tokenizer, folder, verify=True)
        else:
            prepare_shards(config.text_data, tokenizer, folder, stop)
            open_shards(config.text_data, tokenizer, folder, verify=True)

    mesh.on_rank_0(prepare)
    length, batch = config.train.sequence_length, config.train.batch_sequences
    train: Batches
    if streams:
        eval_shard = open_eval_shard(config.text_data, tokenizer, folder, verify=False)
        train = StreamBatches(config, tokenizer, folder, mesh, stop)
        identity, num_tokens = stream_identity(folder), None
    else:
        shard, eval_shard = open_shards(config.text_data, tokenizer, folder, verify=False)
        train = GlobalBatches(shard, length, batch, config.seed, "training")
        identity, num_tokens = shard.facts.file_sha256, len(shard)
    return TextData(
        tokenizer=tokenizer,
        train=train,
        identity=identity,
        num_train_tokens=num_tokens,
        chat_template=None,
        held_out=GlobalBatches(eval_shard, length, batch, config.seed, "held-out"),
        held_out_identity=eval_shard.facts.file_sha256,
        tokens_per_byte=eval_shard.facts.num_tokens / eval_shard.facts.num_bytes,
    )
