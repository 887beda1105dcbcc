"""What a streaming run fixes before its first step: what is held out, and how blocks are cut."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files import replace_text
from ..config import RunConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import NAMES, has_own_eval, is_shard, make_folder, open_eval_source, prepare_eval
from .documents import HUB, Text
from .held_out import digest_of, every_nth
from .hub import HubReader, HubSource, Position
from .shards import ShardWriter
from .sources import open_source
from .token_stream import HeldOutRule
from .tokenizer import Tokenizer

NAME = "stream.json"
VERSION = 1


def is_stream(source: str) -> bool:
    """Say whether training streams a source."""
    return source.startswith(HUB)


def num_block_windows(config: RunConfig) -> int:
    """Return how many windows a block holds."""
    return max(1, config.text_data.block_tokens // config.train.sequence_length)


def prepare_stream(
    config: RunConfig, tokenizer: Tokenizer, folder: Path, stop: StopRequest
) -> None:
    """Write ``eval.bin`` and ``stream.json``, or check that a resumed run has the same settings."""
    make_folder(folder / "blocks")
    facts = _facts(config, tokenizer)
    path = folder / NAME
    if path.exists():
        _check_same(path, facts)
        return
    data = config.text_data
    source = open_source(data, data.source, data.split, "data.source")
    assert isinstance(source, HubSource), "only data sets are streamed"
    num_tokens = config.train.eval_sequences * config.train.sequence_length + 1
    digests: list[str] = []
    if not has_own_eval(data):
        every, eval_path = every_nth(data.eval_fraction), folder / NAMES[True]
        digests = _hold_out(source, every, num_tokens, tokenizer, eval_path, stop)
    else:
        next(iter(source), None)  # fails now if the first row cannot be used
        if not is_shard(data.eval_source):
            held_out = open_eval_source(data)
            limit = num_tokens if isinstance(held_out, HubSource) else None
            prepare_eval(folder, held_out, tokenizer, stop, limit)
    replace_text(path, json.dumps({**facts, "held_out": digests}))


def read_rule(folder: Path) -> HeldOutRule:
    """Return the rule for what must not be trained on."""
    values = json.loads((folder / NAME).read_text(encoding="utf-8"))
    return HeldOutRule(values["every"], frozenset(map(bytes.fromhex, values["held_out"])))


def stream_identity(folder: Path) -> str:
    """Return a hash of everything except the seed that the order of the tokens depends on."""
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


def _facts(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    data = config.text_data
    return {
        "version": VERSION,
        "source": data.source,
        "hf_config": data.hf_config,
        "hf_revision": data.hf_revision,
        "split": data.split,
        "text_key": data.text_key,
        "every": None if has_own_eval(data) else every_nth(data.eval_fraction),
        "tokenizer_sha256": tokenizer.sha256,
        "sequence_length": config.train.sequence_length,
        "block_windows": num_block_windows(config),
    }


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    for key, value in facts.items():
        if stored.get(key) != value:
            raise DataError(
                f"{path} says that this run streams with {key} = {stored.get(key)}, but the "
                f"configuration now gives {value}; use the same value or a new run_dir."
            )


def _hold_out(
    source: HubSource,
    every: int,
    num_tokens: int,
    tokenizer: Tokenizer,
    path: Path,
    stop: StopRequest,
) -> list[str]:
    """Write every n-th document from the beginning until evaluation has enough tokens.

    Returns the hashes of the documents written.
    """
    reader, writer = HubReader(source, Position(), time.sleep), ShardWriter(path, tokenizer)
    digests = []
    try:
        with LongWork("holding out", stop) as work:
            while writer.num_tokens < num_tokens and (text := reader.next_text()) is not None:
                if (reader.position.documents - 1) % every == 0:
                    writer.add(Text(text))
                    writer.flush()
                    digests.append(digest_of(Text(text)).hex())
                work.advance(documents=reader.position.documents, tokens=writer.num_tokens)
        writer.finish(fingerprint=None)
    finally:
        writer.close()
        reader.close()
    return digests
