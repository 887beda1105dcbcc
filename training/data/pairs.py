"""The pairs of a run: tokenized once, by rank 0, into the run folder."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import DataError
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.pairs import PairsConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import make_folder
from .data import Data
from .encoder import BATCH_TEXTS
from .held_out import every_nth
from .origins import are_made_from, origin_of
from .pair_records import PairFiles, TextPair
from .pair_texts import PairTexts, PairWriter
from .tokenizer import Tokenizer, check_tokenizer, open_tokenizer

TRAIN, HELD_OUT = "pairs-train.safetensors", "pairs-eval.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairData(Data):
    """Pairs of texts."""

    tokenizer: Tokenizer
    train: PairTexts
    held_out: PairTexts


def build_pair_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> PairData:
    """Prepare the pairs on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    pairs that cannot be trained on.
    """
    data, train = config.data, config.train
    assert isinstance(data, PairsConfig), "its format asks for this objective"
    if train.sequence_length < 2:
        raise DataError(
            "train.sequence_length is 1, which leaves no room for a text and its end; use 2 or "
            "more."
        )
    tokenizer = open_tokenizer(data.tokenizer)
    if config.start_from is not None:
        check_tokenizer(config.start_from, data.tokenizer, tokenizer)
    stop = stop or StopRequest()
    mesh.on_rank_0(lambda: _prepare(data, tokenizer, folder, stop))
    options = (tokenizer.eos_id, train.sequence_length, train.batch_sequences, config.seed)
    pairs = PairTexts(folder / TRAIN, *options)
    held_out = PairTexts(folder / HELD_OUT, *options)
    if mesh.rank == 0:
        for event, part in (("pairs_train", pairs), ("pairs_held_out", held_out)):
            facts = " ".join(f"{name}={value}" for name, value in asdict(part.facts).items())
            sys.stderr.write(f"event={event} {facts}\n")
    return PairData(
        tokenizer=tokenizer,
        train=pairs,
        identity=pairs.identity,
        num_train_tokens=pairs.facts.source_rows + pairs.facts.target_rows,
        held_out_identity=held_out.identity,
        held_out=held_out,
    )


def _prepare(config: PairsConfig, tokenizer: Tokenizer, folder: Path, stop: StopRequest) -> None:
    """Write both files unless they are there and were made from the same."""
    make_folder(folder)
    keys = (config.source_key, config.target_key)
    sources = [PairFiles(config.source, "data.source", *keys)]
    if config.eval_source is not None:
        sources.append(PairFiles(config.eval_source, "data.eval_source", *keys))
    prints = [source.fingerprint() for source in sources]
    facts = [prints, tokenizer.sha256, config.eval_fraction]
    origin = origin_of(facts)
    paths = (folder / TRAIN, folder / HELD_OUT)
    if are_made_from(paths, origin, prints):
        return
    train, held_out = _split(config, sources)
    with LongWork("tokenising", stop, len(train) + len(held_out)) as work:
        for path, pairs in zip(paths, (train, held_out), strict=True):
            writer = PairWriter()
            for start in range(0, len(pairs), BATCH_TEXTS):
                some = pairs[start : start + BATCH_TEXTS]
                both = tokenizer.encode_batch([text for pair in some for text in pair])
                for source, target in zip(both[::2], both[1::2], strict=True):
                    writer.add(source, target)
                work.advance(len(some))
            writer.write(path, origin)


def _split(
    config: PairsConfig, sources: Sequence[PairFiles]
) -> tuple[list[TextPair], list[TextPair]]:
    """Return the pairs to train on and those held out, whose sources are not trained on."""
    own = list(sources[0])
    if len(sources) > 1:
        held_out = list(sources[1])
    else:
        every = every_nth(config.eval_fraction)
        held_out = own[every // 2 :: every]
    texts = {pair.source for pair in held_out}
    train = [pair for pair in own if pair.source not in texts]
    for found, name in ((train, "train on"), (held_out, "hold out")):
        if not found:
            raise DataError(
                f"data.source is {config.source!r}, which leaves no pair to {name}; give more of "
                "them, or data.eval_source."
            )
    return train, held_out
