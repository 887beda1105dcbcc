"""The conversations of a run: tokenized once, by rank 0, into the run folder."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ...chat_templates.renderer import TemplateProcess
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.text import TextsConfig
from ..stop import StopRequest
from .chat_files import prepare_chats
from .chat_mask import ChatEncoder
from .chat_records import Conversations
from .chat_windows import ChatWindows
from .data import Data
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
        mesh.on_rank_0(
            lambda: prepare_chats(
                config.text_data,
                Conversations,
                tokenizer,
                encoder,
                lambda where, chat: [encoder.encode(where, chat)],
                (folder / TRAIN, folder / HELD_OUT),
                stop,
            )
        )
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
