"""``moeyard tokenize``: a source becomes a folder with a tokenizer and two token shards."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from ...errors import DataError
from ...files import new_folder
from ..formats.text import TextsConfig
from ..stop import StopRequest
from ..work import LongWork
from .bpe import SMALLEST, train_bpe
from .corpus import NAMES, has_own_eval, is_shard, open_eval_source, write_both, write_one
from .documents import Document
from .held_out import find_split
from .shards import read_facts
from .sources import open_source
from .tokenizer import open_tokenizer

TOKENIZER = "tokenizer"
LEARNT_IDS = 8192
"""Default vocabulary size of a learnt tokenizer."""
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Tokenized:
    """What the finished folder holds."""

    vocab_size: int
    train_tokens: int
    eval_tokens: int


def tokenize(
    config: TextsConfig,
    out_dir: Path,
    vocab_size: int | None,
    chat_template: Path | None,
    stop: StopRequest,
) -> Tokenized:
    """Write ``out_dir`` whole or not at all.

    With ``vocab_size`` a byte-level BPE of that size is learnt from the training text; with None
    ``config.tokenizer`` is used.
    """
    _refuse_unless_free(out_dir)
    for field, source in (("SOURCE", config.source), ("--eval-source", config.eval_source)):
        if is_shard(source):
            raise DataError(f"{field} is {source!r}, which is a token shard already; give text.")
    if vocab_size is not None and vocab_size < SMALLEST:
        raise DataError(
            f"--vocab-size is {vocab_size}, but a byte-level tokenizer has at least {SMALLEST} "
            "ids; give more."
        )
    template = None if chat_template is None else _read_template(chat_template)
    try:
        with new_folder(out_dir) as unfinished:
            (unfinished / TOKENIZER).mkdir()
            found = _fill(unfinished, config, vocab_size, stop)
            if template is not None:
                (unfinished / TOKENIZER / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{out_dir} cannot be written ({error.strerror}); choose another folder or make room."
        ) from error
    return found


def _fill(
    folder: Path, config: TextsConfig, vocab_size: int | None, stop: StopRequest
) -> Tokenized:
    source = open_source(config, config.source, config.split, "SOURCE")
    split = None
    if not has_own_eval(config):
        with LongWork("reading", stop) as work:
            split = find_split(source, config.source, config.eval_fraction, work)
    name = config.tokenizer
    if vocab_size is not None:
        name = str(folder / TOKENIZER)
        training: Iterable[Document] = source
        if split is not None:  # held-out text must not shape the tokens either
            training = (document for is_held, document in split.sides(source) if not is_held)
        train_bpe(training, vocab_size, folder / TOKENIZER, stop)
    tokenizer = open_tokenizer(name)
    if vocab_size is None:
        tokenizer.save(folder / TOKENIZER)
    if split is not None:
        write_both(folder, source, split, tokenizer, None, stop)
    else:
        write_one(folder / NAMES[False], source, tokenizer, None, stop)
        write_one(folder / NAMES[True], open_eval_source(config), tokenizer, None, stop)
    train, held_out = (read_facts(folder / name).num_tokens for name in NAMES.values())
    return Tokenized(tokenizer.vocab_size, train, held_out)


def _refuse_unless_free(out_dir: Path) -> None:
    if all((out_dir / name).with_suffix(".json").is_file() for name in NAMES.values()):
        raise DataError(
            f"{out_dir} holds finished token shards already; use them, or give another folder."
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir} is not an empty folder; give another one.")


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"--chat-template is {str(path)!r}, which cannot be read ({reason}); "
            "give a Jinja template."
        ) from None
    try:
        SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise DataError(
            f"--chat-template {str(path)!r} is not a Jinja template (line {error.lineno}: "
            f"{error.message}); correct it."
        ) from None
    return text
