"""The preference pairs of a run: tokenized once, by rank 0, into the run folder."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ...chat_templates.renderer import TemplateProcess
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..stop import StopRequest
from .chat import open_chat
from .chat_files import prepare_chats
from .data import Data
from .preference_pairs import PreferencePairs
from .preference_records import Pairs
from .tokenizer import check_tokenizer, open_tokenizer

TRAIN, HELD_OUT = "preference-train.safetensors", "preference-eval.safetensors"


@dataclass(frozen=True, slots=True)
class PreferenceData(Data):
    """Pairs of answers."""

    train: PreferencePairs
    held_out: PreferencePairs
    folder: Path
    """Where the files are."""


def build_preference_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> PreferenceData:
    """Prepare the pairs on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    pairs that cannot be trained on.
    """
    tokenizer = open_tokenizer(config.text_data.tokenizer)
    if config.start_from is not None:
        check_tokenizer(config.start_from, config.text_data.tokenizer, tokenizer)
    stop = stop or StopRequest()
    paths = folder / TRAIN, folder / HELD_OUT
    with TemplateProcess() as process:
        encoder = open_chat(config.text_data, tokenizer, process)
        mesh.on_rank_0(
            lambda: prepare_chats(
                config.text_data,
                Pairs,
                tokenizer,
                encoder,
                lambda where, pair: [encoder.encode(where, side) for side in pair],
                paths,
                stop,
            )
        )
    options = config.train.sequence_length, config.train.batch_sequences, config.seed
    train = PreferencePairs(paths[0], *options, "training")
    held_out = PreferencePairs(paths[1], *options, "held-out")
    if mesh.rank == 0:
        for event, pairs in (("preference_train", train), ("preference_held_out", held_out)):
            facts = " ".join(f"{name}={value}" for name, value in asdict(pairs.facts).items())
            sys.stderr.write(f"event={event} {facts}\n")
    return PreferenceData(
        tokenizer=tokenizer,
        train=train,
        identity=train.identity,
        num_train_tokens=train.facts.rows,
        held_out_identity=held_out.identity,
        held_out=held_out,
        chat_template=encoder.template,
        folder=folder,
    )
