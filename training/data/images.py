"""The images of a run: read once, by rank 0, into the run folder. N images."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import ConfigError, DataError
from ...moe.config.vision_tasks import ClassesTask
from ...moe.config.vit import ViTConfig, alike
from ...moe.pixels import check_images
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.images import ImagesConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import make_folder
from .data import Data
from .documents import Files
from .held_out import every_nth
from .image_arrays import ImageArrays
from .image_files import is_array_file
from .image_folder import ImageFolder
from .image_store import Array, LabelledImages, has_target, write_images
from .image_targets import read_labels, read_maps, sorted_labels
from .origins import are_made_from, origin_of
from .presence import existing

TRAIN, HELD_OUT = "images-train.safetensors", "images-eval.safetensors"


@dataclass(frozen=True, slots=True)
class ImageData(Data):
    """Images with targets for the tasks of a model."""

    train: LabelledImages
    held_out: LabelledImages


class Found(NamedTuple):
    """The images of a source."""

    images_NHWC: Array
    targets: dict[str, Array]
    """By task, in the form of image_targets.py; labels of images are words still."""


def build_image_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> ImageData:
    """Read the images on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    images that cannot be trained on.
    """
    section, model = config.data, config.model
    assert isinstance(section, ImagesConfig) and isinstance(model, ViTConfig), "check() was called"
    mesh.on_rank_0(lambda: _prepare(section, model, folder, stop or StopRequest()))
    names = [task.name for task in model.tasks]
    options = (names, model.num_rows, config.train.batch_sequences, config.seed)
    train = LabelledImages(folder / TRAIN, *options)
    held_out = LabelledImages(folder / HELD_OUT, *options)
    if mesh.rank == 0:
        for event, part in (("images_train", train), ("images_held_out", held_out)):
            facts = " ".join(f"{name}={count}" for name, count in part.facts.targets.items())
            sys.stderr.write(f"event={event} images={part.facts.images} {facts}\n")
    return ImageData(
        tokenizer=None,
        train=train,
        identity=train.identity,
        num_train_tokens=train.epoch_rows,
        held_out_identity=held_out.identity,
        held_out=held_out,
    )


def _prepare(section: ImagesConfig, model: ViTConfig, folder: Path, stop: StopRequest) -> None:
    """Write both files unless they are there and were made from the same."""
    make_folder(folder)
    sources = [_open(section.source, "data.source", model)]
    if section.eval_source is not None:
        sources.append(_open(section.eval_source, "data.eval_source", model))
    prints = [Files(one.paths, "", "", "").fingerprint() for one in sources]
    shape = [model.image_size, model.channels, [alike(task) for task in model.tasks]]
    origin = origin_of([prints, shape, section.eval_fraction])
    paths = (folder / TRAIN, folder / HELD_OUT)
    if are_made_from(paths, origin, prints):
        return
    with LongWork("reading images", stop) as work:
        names = (section.source, str(section.eval_source))
        found = [_read(one, name, model, work) for one, name in zip(sources, names, strict=False)]
    train, held_out = _split(found, section, model)
    labels = _labels(train, held_out, model)
    for path, part in zip(paths, (train, held_out), strict=True):
        targets = dict(part.targets)
        for name, known in labels.items():
            index = {label: number for number, label in enumerate(known)} | {"": -1}
            numbers = [index[label] for label in targets[name].tolist()]
            targets[name] = np.array(numbers, dtype=np.int32)
        _check_targets(targets, section, is_held_out=part is held_out)
        write_images(path, part.images_NHWC, targets, labels, origin)


def _open(source: str, field: str, model: ViTConfig) -> ImageArrays | ImageFolder:
    path = existing(source, field)
    if path.is_dir():
        return ImageFolder(source, field, model)
    if not is_array_file(path) or not path.is_file():
        raise DataError(
            f"{field} is {source!r}, which is neither a folder nor an .npz file; give a folder of "
            "images, or an array file."
        )
    return ImageArrays(source, field)


def _read(source: ImageArrays | ImageFolder, name: str, model: ViTConfig, work: LongWork) -> Found:
    """Read and check all of a source."""
    images = check_images(source.read_images(work.advance), name)
    _, height, width, channels = images.shape
    if (height, width) != model.image_size or channels != model.channels:
        wanted = " x ".join(map(str, model.image_size))
        raise ConfigError(
            f"{name} has images of {height} x {width} pixels with {channels} channels, but "
            f"model.image_size and model.channels say {wanted} with {model.channels}; change one "
            "of them."
        )
    targets: dict[str, Array] = {}
    for task in model.tasks:
        raw = source.read_targets(task, work.advance)
        if raw is None:
            raise DataError(
                f"{name} has nothing for the task {task.name!r}; add an array of this name, or in "
                "a folder a map NAME.TASK.png next to each image or a folder for each label, or "
                "take the task out of model.tasks."
            )
        if isinstance(task, ClassesTask):
            words = read_labels(raw, task, name)
            targets[task.name] = np.array([word or "" for word in words])
        else:
            targets[task.name] = read_maps(raw, task, model.image_size, name)
    return Found(images, targets)


def _split(found: Sequence[Found], section: ImagesConfig, model: ViTConfig) -> tuple[Found, Found]:
    """Return the images to train on and those held out, whose copies are not trained on.

    Every n-th image is held out, of each label if there are labels: the middle one of n.
    """
    own = found[0]
    count = len(own.images_NHWC)
    if len(found) > 1:
        held_out, chosen = found[1], list(range(count))
    else:
        every = every_nth(section.eval_fraction)
        labelled = [task.name for task in model.tasks if isinstance(task, ClassesTask)]
        groups = own.targets[labelled[0]].tolist() if labelled else [""] * count
        seen: Counter[str] = Counter()
        aside = []
        for image, group in enumerate(groups):
            if seen[group] % every == every // 2:
                aside.append(image)
            seen[group] += 1
        held_out = _some(own, aside)
        chosen = sorted(set(range(count)) - set(aside))
    copies = {image.tobytes() for image in held_out.images_NHWC}
    train = _some(own, [n for n in chosen if own.images_NHWC[n].tobytes() not in copies])
    for part, name in ((train, "train on"), (held_out, "hold out")):
        if not len(part.images_NHWC):
            raise DataError(
                f"data.source is {section.source!r}, which leaves no image to {name}; give more of "
                "them, or data.eval_source."
            )
    return train, held_out


def _some(found: Found, images: list[int]) -> Found:
    return Found(
        found.images_NHWC[images], {name: all_[images] for name, all_ in found.targets.items()}
    )


def _labels(train: Found, held_out: Found, model: ViTConfig) -> dict[str, tuple[str, ...]]:
    """Return the labels of the training images, by task."""
    found = {}
    for task in model.tasks:
        if not isinstance(task, ClassesTask):
            continue
        words = (part.targets[task.name].tolist() for part in (train, held_out))
        labels, others = (set(own) - {""} for own in words)
        if len(labels) < 2:
            raise DataError(
                f"the training images have {len(labels)} labels for the task {task.name!r}; give "
                "images of two labels or more."
            )
        if others - labels:
            raise DataError(
                f"the label {min(others - labels)!r} of the task {task.name!r} is on held-out "
                "images only, so nothing would learn it; give training images with it, or take it "
                "out."
            )
        found[task.name] = sorted_labels(labels)
    return found


def _check_targets(targets: dict[str, Array], section: ImagesConfig, is_held_out: bool) -> None:
    """Raise :class:`DataError` for a task without a target."""
    for name, values in targets.items():
        if not has_target(values).any():
            part = "held-out" if is_held_out else "training"
            raise DataError(
                f"data.source is {section.source!r}, whose {part} images have no target for the "
                f"task {name!r}; give some, or take the task out of model.tasks."
            )
