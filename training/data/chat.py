"""The conversations of a run: tokenized once, by rank 0, into the run folder."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ...chat_templates.renderer import TemplateProcess
from ...errors import DataError
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.text import TextsConfig
from ..stop import StopRequest
from ..work import LongWork
from .chat_mask import ChatEncoder
from .chat_records import Conversation, Conversations
from .chat_windows import ChatWindows, ChatWriter, made_from
from .corpus import make_folder
from .data import Data
from .held_out import every_nth
from .tokenizer import Tokenizer, check_tokenizer, open_tokenizer

TRAIN, HELD_OUT = "chat-train.safetensors", "chat-eval.safetensors"


@dataclass(frozen=True, slots=True)
class ChatData(Data):
    """Windows of conversations."""

    train: ChatWindows
    held_out: ChatWindows


def open_chat(config: TextsConfig, tokenizer: Tokenizer, process: TemplateProcess) -> ChatEncoder:
    """Return the encoder of a configuration's conversations; ``process`` renders them."""
    template = None if config.chat_template is None else Path(config.chat_template)
    return ChatEncoder(tokenizer, template, process)


def build_chat_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> ChatData:
    """Prepare the conversations on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    conversations that cannot be trained on.
    """
    tokenizer = open_tokenizer(config.text_data.tokenizer)
    if config.start_from is not None:
        check_tokenizer(config.start_from, config.text_data.tokenizer, tokenizer)
    stop = stop or StopRequest()
    with TemplateProcess() as process:
        encoder = open_chat(config.text_data, tokenizer, process)
        mesh.on_rank_0(lambda: _prepare(config.text_data, tokenizer, encoder, folder, stop))
    length, batch = config.train.sequence_length, config.train.batch_sequences
    train = ChatWindows(folder / TRAIN, length, batch, config.seed, "training")
    held_out = ChatWindows(folder / HELD_OUT, length, batch, config.seed, "held-out")
    if mesh.rank == 0:
        for event, windows in (("chat_train", train), ("chat_held_out", held_out)):
            facts = " ".join(f"{name}={value}" for name, value in asdict(windows.facts).items())
            sys.stderr.write(f"event={event} {facts}\n")
    return ChatData(
        tokenizer=tokenizer,
        train=train,
        identity=train.identity,
        num_train_tokens=train.facts.rows,
        held_out_identity=held_out.identity,
        held_out=held_out,
        chat_template=encoder.template,
    )


def _prepare(
    config: TextsConfig, tokenizer: Tokenizer, encoder: ChatEncoder, folder: Path, stop: StopRequest
) -> None:
    """Write both files unless they are there and were made from the same."""
    make_folder(folder)
    sources = [Conversations(config.source, "data.source")]
    if config.eval_source is not None:
        sources.append(Conversations(config.eval_source, "data.eval_source"))
    prints = [source.fingerprint() for source in sources]
    facts = [prints, tokenizer.sha256, encoder.template, config.eval_fraction]
    origin = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    paths = (folder / TRAIN, folder / HELD_OUT)
    if None not in prints and all(made_from(path) == origin for path in paths):
        return
    train, held_out = ChatWriter(), ChatWriter()
    with LongWork("tokenising", stop) as work:
        for index, (is_held_out, where, chat) in enumerate(_sides(config, sources), start=1):
            writer = held_out if is_held_out else train
            writer.add(encoder.encode(where, chat))
            work.advance(conversations=index)
    for writer, name in ((train, "train on"), (held_out, "hold out")):
        if not len(writer):
            raise DataError(
                f"data.source is {config.source!r}, which leaves no conversation to {name}; give "
                "more of them, or data.eval_source."
            )
    train.write(paths[0], origin)
    held_out.write(paths[1], origin)


def _sides(
    config: TextsConfig, sources: list[Conversations]
) -> Iterator[tuple[bool, str, Conversation]]:
    """Yield (is held out, where, conversation); copies of held-out conversations are left out."""
    every = every_nth(config.eval_fraction)
    held_out = set()
    has_own_eval = len(sources) > 1
    for index, (where, chat) in enumerate(sources[-1]):
        if has_own_eval or index % every == 0:
            held_out.add(_digest(chat))
            yield True, where, chat
    for where, chat in sources[0]:
        if _digest(chat) not in held_out:
            yield False, where, chat


def _digest(chat: Conversation) -> bytes:
    text = json.dumps([chat.messages, chat.tools], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
