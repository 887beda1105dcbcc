"""The labelled texts of a run: tokenized once, by rank 0, into the run folder."""

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import DataError
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.text import LabelledConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import make_folder
from .data import Data
from .encoder import BATCH_TEXTS
from .held_out import every_nth
from .labelled_records import LabelledFiles, LabelledText
from .labelled_texts import LabelledTexts, LabelledWriter
from .origins import are_made_from, origin_of
from .tokenizer import Tokenizer, check_tokenizer, open_tokenizer

TRAIN, HELD_OUT = "labelled-train.safetensors", "labelled-eval.safetensors"


@dataclass(frozen=True, slots=True)
class LabelledData(Data):
    """Texts with labels."""

    train: LabelledTexts
    held_out: LabelledTexts
    labels: tuple[str, ...]
    """Those of the training texts, sorted."""


def build_labelled_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> LabelledData:
    """Prepare the texts on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    texts that cannot be trained on.
    """
    data = config.data
    assert isinstance(data, LabelledConfig), "its format asks for this objective"
    tokenizer = open_tokenizer(data.tokenizer)
    if config.start_from is not None:
        check_tokenizer(config.start_from, data.tokenizer, tokenizer)
    if not tokenizer.marks.before:
        raise DataError(
            f"data.tokenizer {data.tokenizer!r} has no cls_token and no eos_token to put in "
            "front of texts; set one in tokenizer_config.json."
        )
    stop = stop or StopRequest()
    mesh.on_rank_0(lambda: _prepare(data, tokenizer, folder, stop))
    train = config.train
    options = (tokenizer.marks, train.sequence_length, train.batch_sequences, config.seed)
    texts = LabelledTexts(folder / TRAIN, *options)
    held_out = LabelledTexts(folder / HELD_OUT, *options)
    if mesh.rank == 0:
        for event, part in (("labelled_train", texts), ("labelled_held_out", held_out)):
            facts = " ".join(f"{name}={value}" for name, value in asdict(part.facts).items())
            sys.stderr.write(f"event={event} {facts} labels={len(part.labels)}\n")
    return LabelledData(
        tokenizer=tokenizer,
        train=texts,
        identity=texts.identity,
        num_train_tokens=texts.facts.rows,
        held_out_identity=held_out.identity,
        held_out=held_out,
        labels=tuple(texts.labels),
        chat_template=None,
    )


def _prepare(config: LabelledConfig, tokenizer: Tokenizer, folder: Path, stop: StopRequest) -> None:
    """Write both files unless they are there and were made from the same."""
    make_folder(folder)
    keys = (config.text_key, config.label_key)
    sources = [LabelledFiles(config.source, "data.source", *keys)]
    if config.eval_source is not None:
        sources.append(LabelledFiles(config.eval_source, "data.eval_source", *keys))
    prints = [source.fingerprint() for source in sources]
    facts = [prints, tokenizer.sha256, config.eval_fraction]
    origin = origin_of(facts)
    paths = (folder / TRAIN, folder / HELD_OUT)
    if are_made_from(paths, origin, prints):
        return
    train, held_out = _split(config, sources)
    labels = _labels_of(train, held_out, config)
    with LongWork("tokenising", stop, len(train) + len(held_out)) as work:
        for path, texts in zip(paths, (train, held_out), strict=True):
            writer = LabelledWriter()
            for start in range(0, len(texts), BATCH_TEXTS):
                some = texts[start : start + BATCH_TEXTS]
                encoded = tokenizer.encode_batch([one.text for one in some])
                for ids, one in zip(encoded, some, strict=True):
                    writer.add(ids, one.label)
                work.advance(len(some))
            writer.write(path, labels, origin)


def _split(
    config: LabelledConfig, sources: list[LabelledFiles]
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Return the texts to train on and those held out, whose copies are not trained on.

    Every n-th text of each label is held out: labels may follow each other in any pattern. It is
    the middle one of n, so that a label with few texts keeps them for training.
    """
    every = every_nth(config.eval_fraction)
    own = list(sources[0])
    if len(sources) > 1:
        held_out = list(sources[1])
    else:
        seen: Counter[str] = Counter()
        held_out = []
        for one in own:
            if seen[one.label] % every == every // 2:
                held_out.append(one)
            seen[one.label] += 1
    texts = {one.text for one in held_out}
    train = [one for one in own if one.text not in texts]
    for found, name in ((train, "train on"), (held_out, "hold out")):
        if not found:
            raise DataError(
                f"data.source is {config.source!r}, which leaves no text to {name}; give more of "
                "them, or data.eval_source."
            )
    return train, held_out


def _labels_of(
    train: list[LabelledText], held_out: list[LabelledText], config: LabelledConfig
) -> list[str]:
    """Return the labels of the training texts, sorted."""
    counts = Counter(one.label for one in train)
    if len(counts) < 2:
        raise DataError(
            f"data.source is {config.source!r}, whose training texts all have the label "
            f"{next(iter(counts))!r}; give texts of two labels or more."
        )
    only_held_out = sorted({one.label for one in held_out} - counts.keys())
    if only_held_out:
        raise DataError(
            f"the label {only_held_out[0]!r} is in the held-out texts only, so nothing would learn "
            "it; give training texts with it, or take it out."
        )
    return sorted(counts)
