"""Turn ``data.source`` into a training and a held-out shard."""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import DataError
from ..config import DataConfig
from .shards import TokenShard, open_shard, read_facts, write_shard
from .tokenizer import Tokenizer

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def prepare_shards(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``train.bin`` and ``eval.bin`` into ``folder`` unless whole ones are there.

    Sources that are shards already are left where they are.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error.strerror}); remove what is there."
        ) from None
    if not config.source.endswith(".bin"):
        documents = read_documents(config.source, config.text_key, "data.source")
        if config.eval_source is None:
            training, held_out = split(documents, config.source, config.eval_fraction)
            _write_once(folder / "eval.bin", held_out, tokenizer)
        else:
            training = documents
        _write_once(folder / "train.bin", training, tokenizer)
    elif config.eval_source is None:
        raise DataError(
            f"data.source is the shard {config.source!r}, which cannot be split; "
            "give data.eval_source."
        )
    if config.eval_source is not None and not config.eval_source.endswith(".bin"):
        held_out = read_documents(config.eval_source, config.text_key, "data.eval_source")
        _write_once(folder / "eval.bin", held_out, tokenizer)


def open_shards(
    config: DataConfig, tokenizer: Tokenizer, folder: Path, verify: bool
) -> tuple[TokenShard, TokenShard]:
    """Open the training and the held-out shard that :func:`prepare_shards` left."""
    train, held_out = folder / "train.bin", folder / "eval.bin"
    if config.source.endswith(".bin"):
        train = Path(config.source)
    if config.eval_source is not None and config.eval_source.endswith(".bin"):
        held_out = Path(config.eval_source)
    return open_shard(train, tokenizer, verify), open_shard(held_out, tokenizer, verify)


def read_documents(source: str, text_key: str, field: str) -> list[str]:
    """Read the documents of a text file, a JSONL file or the standard library.

    ``field`` is the configuration key that messages name.
    """
    if source == "stdlib":
        return [text for _, text in standard_library()]
    path = Path(source)
    try:
        if path.suffix == ".jsonl":
            return list(_read_jsonl(path, text_key))
        return [path.read_text(encoding="utf-8")]
    except OSError as error:
        raise DataError(
            f"{field} is {source!r}, which cannot be read ({error.strerror}); give 'stdlib', "
            "a text file, a .jsonl file or a .bin shard."
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{field} {source!r} is not UTF-8 text; convert it first.") from None


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the standard library's non-test modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if TEST_FOLDERS.isdisjoint(relative.parts[:-1]):
            try:
                yield relative.as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules are in other encodings on purpose


def split(documents: list[str], source: str, fraction: float) -> tuple[list[str], list[str]]:
    """Hold out the end of a single text, or every n-th of many documents."""
    if len(documents) == 1:
        text = documents[0]
        cut = len(text) - max(1, int(len(text) * fraction))
        return [text[:cut]], [text[cut:]]
    every = max(2, round(1 / fraction))
    held_out = documents[::every]
    seen = set(held_out)  # a copy of a held-out text must not be trained on
    training = [text for text in documents if text not in seen]
    if not training:
        raise DataError(f"data.source {source!r} holds no documents; give a corpus with some text.")
    return training, held_out


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(
                    f"{path} line {number} is not a JSON object with text under {text_key!r}; "
                    "mend the line or set data.text_key."
                ) from None
            yield text


def _hash(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def _write_once(path: Path, documents: list[str], tokenizer: Tokenizer) -> None:
    source_sha256 = _hash(documents)
    if path.exists() and path.with_suffix(".json").exists():
        facts = read_facts(path)
        if facts.source_sha256 != source_sha256 or facts.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{path} was made from other text or with another tokenizer "
                f"(Python {sys.version.split()[0]} is running); use a new run_dir."
            )
        return
    write_shard(path, documents, tokenizer, source_sha256)
