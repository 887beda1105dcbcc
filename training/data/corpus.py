"""Turn ``data.source`` into a training and a held-out shard."""

import sys
from pathlib import Path

from ...errors import DataError
from ..formats.text import TextsConfig
from ..stop import StopRequest
from ..work import LongWork
from .documents import Source
from .held_out import Split, find_split
from .shards import ShardWriter, TokenShard, hash_of_documents, open_shard, read_facts
from .sources import open_source
from .tokenizer import Tokenizer

NAMES = {False: "train.bin", True: "eval.bin"}
"""File names by whether the text is held out."""


def prepare_shards(
    config: TextsConfig, tokenizer: Tokenizer, folder: Path, stop: StopRequest | None = None
) -> None:
    """Write ``train.bin`` and ``eval.bin`` into ``folder`` unless it has whole ones.

    Sources that are already shards are not copied.
    """
    stop = stop or StopRequest()
    make_folder(folder)
    if not is_shard(config.source):
        source = open_source(config, config.source, config.split, "data.source")
        if has_own_eval(config):
            _write_once(folder / NAMES[False], source, tokenizer, stop, None)
        else:
            _write_both_once(folder, source, config, tokenizer, stop)
    elif config.eval_source is None:
        raise DataError(
            f"data.source is the shard {config.source!r}, which cannot be split; "
            "give data.eval_source."
        )
    if has_own_eval(config) and not is_shard(config.eval_source):
        prepare_eval(folder, open_eval_source(config), tokenizer, stop, None)


def open_shards(
    config: TextsConfig, tokenizer: Tokenizer, folder: Path, verify: bool
) -> tuple[TokenShard, TokenShard]:
    """Open the training and the held-out shard that :func:`prepare_shards` left."""
    train = Path(config.source) if is_shard(config.source) else folder / NAMES[False]
    return open_shard(train, tokenizer, verify), open_eval_shard(config, tokenizer, folder, verify)


def open_eval_shard(
    config: TextsConfig, tokenizer: Tokenizer, folder: Path, verify: bool
) -> TokenShard:
    """Open the held-out shard."""
    path = folder / NAMES[True]
    if config.eval_source is not None and is_shard(config.eval_source):
        path = Path(config.eval_source)
    return open_shard(path, tokenizer, verify)


def prepare_eval(
    folder: Path, source: Source, tokenizer: Tokenizer, stop: StopRequest, limit: int | None
) -> None:
    """Write ``eval.bin`` from a separate source; stop after ``limit`` tokens."""
    _write_once(folder / NAMES[True], source, tokenizer, stop, limit)


def make_folder(folder: Path) -> None:
    """Make a folder; raise :class:`DataError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error.strerror}); remove what is there."
        ) from None


def is_shard(source: str | None) -> bool:
    """Say whether a source is a token shard."""
    return source is not None and source.endswith(".bin")


def has_own_eval(config: TextsConfig) -> bool:
    """Say whether held-out text has a separate source."""
    return config.eval_source is not None or config.eval_split is not None


def open_eval_source(config: TextsConfig) -> Source:
    """Open the separate source of held-out text."""
    split = config.eval_split or config.split
    if config.eval_source is None:
        return open_source(config, config.source, split, "data.source")
    return open_source(config, config.eval_source, split, "data.eval_source")


def write_both(
    folder: Path,
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    fingerprint: str | None,
    stop: StopRequest,
) -> None:
    """Read ``source`` once and write both shards."""
    writers = {side: ShardWriter(folder / name, tokenizer) for side, name in NAMES.items()}
    try:
        with LongWork("tokenising", stop, split.num_documents) as work:
            for is_held_out, document in split.sides(source):
                writers[is_held_out].add(document)
                work.advance(tokens=sum(writer.num_tokens for writer in writers.values()))
            for writer in writers.values():
                writer.finish(fingerprint)
            tokens = {side: writer.num_tokens for side, writer in writers.items()}
            work.note(tokens=sum(tokens.values()))
        sys.stderr.write(
            f"event=split train_tokens={tokens[False]} eval_tokens={tokens[True]} "
            f"held_out={tokens[True] / max(1, sum(tokens.values())):.4f} "
            f"documents={split.num_documents} cut={'no' if split.ends is None else 'ends'}\n"
        )
    finally:
        for writer in writers.values():
            writer.close()


def write_one(
    path: Path,
    source: Source,
    tokenizer: Tokenizer,
    fingerprint: str | None,
    stop: StopRequest,
    limit: int | None = None,
) -> None:
    """Write the documents of ``source``; stop after ``limit`` tokens if given."""
    writer = ShardWriter(path, tokenizer)
    try:
        with LongWork("tokenising", stop) as work:
            for number, document in enumerate(source, start=1):
                writer.add(document)
                work.advance(documents=number, tokens=writer.num_tokens)
                if limit is not None and writer.num_tokens >= limit:
                    break
            writer.finish(fingerprint)
            work.note(tokens=writer.num_tokens)
    finally:
        writer.close()


def _write_both_once(
    folder: Path, source: Source, config: TextsConfig, tokenizer: Tokenizer, stop: StopRequest
) -> None:
    paths = [folder / name for name in NAMES.values()]
    fingerprint = source.fingerprint()
    if fingerprint is not None:
        fingerprint += f" without {config.eval_fraction}"
    if all(_is_unchanged(path, fingerprint, tokenizer) for path in paths):
        return
    with LongWork("reading", stop) as work:
        split = find_split(source, config.source, config.eval_fraction, work)
    if not all(map(_exists, paths)):
        write_both(folder, source, split, tokenizer, fingerprint, stop)
        return
    for side, name in NAMES.items():
        documents = (d for is_held_out, d in split.sides(source) if is_held_out is side)
        _check_same(folder / name, hash_of_documents(documents), tokenizer)


def _write_once(
    path: Path, source: Source, tokenizer: Tokenizer, stop: StopRequest, limit: int | None
) -> None:
    fingerprint = source.fingerprint()
    if not _exists(path):
        write_one(path, source, tokenizer, fingerprint, stop, limit)
    elif not _is_unchanged(path, fingerprint, tokenizer):
        _check_same(path, hash_of_documents(source), tokenizer)


def _exists(path: Path) -> bool:
    return path.exists() and path.with_suffix(".json").exists()


def _is_unchanged(path: Path, fingerprint: str | None, tokenizer: Tokenizer) -> bool:
    """Say whether fingerprints alone prove that a shard's text is unchanged."""
    if fingerprint is None or not _exists(path):
        return False
    facts = read_facts(path)
    return (facts.source_fingerprint, facts.tokenizer_sha256) == (fingerprint, tokenizer.sha256)


def _check_same(path: Path, source_sha256: str, tokenizer: Tokenizer) -> None:
    facts = read_facts(path)
    if facts.source_sha256 != source_sha256 or facts.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} was made from other text, or with another tokenizer, data.eval_fraction or "
            f"release (Python {sys.version.split()[0]} is running); use a new run_dir."
        )
