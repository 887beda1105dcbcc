"""``moeyard predict``: what a vision model says of images, for one task."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .options import Parsers, add_command, add_loading, add_model

if TYPE_CHECKING:
    from ..moe.models.vision_model import VisionModel


def add(parsers: Parsers) -> None:
    """Add the command."""
    predict = add_command(
        parsers, "predict", "do a task on images: print labels, or write maps of pixels"
    )
    add_model(predict)
    predict.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="image files of the model's size; or one .npz file with the array images",
    )
    predict.add_argument(
        "--task", metavar="NAME", help="what to do, one of the model's tasks; default: the only one"
    )
    predict.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where maps go, for tasks of pixels: NAME.TASK.png for classes, NAME.TASK.npy for "
        "values",
    )
    predict.add_argument(
        "--batch", type=int, default=16, metavar="N", help="images computed together; default: 16"
    )
    add_loading(predict)
    predict.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each image."""
    from ..moe.config.vision_tasks import ClassesTask
    from .model_folder import open_kind_of

    if arguments.batch < 1:
        raise ConfigError(f"--batch is {arguments.batch}; use a number from 1 upwards.")
    model: VisionModel = open_kind_of(arguments, "vit")
    task = model.task(arguments.task)
    is_of_pixels = not isinstance(task, ClassesTask)
    if is_of_pixels and arguments.out is None:
        raise ConfigError(f"the task {task.name!r} gives maps of pixels; name a folder with --out.")
    names, images = _read(arguments.images, model)
    if is_of_pixels:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(names), arguments.batch):
        some = slice(start, start + arguments.batch)
        answers = model(images[some], task.name, arguments.batch)
        for name, answer in zip(names[some], answers, strict=True):
            line: dict[str, Any] = {"image": name, "task": task.name}
            if is_of_pixels:
                line["map"] = str(_write(arguments.out, f"{Path(name).stem}.{task.name}", answer))
            else:
                line |= {"label": answer.label, "probabilities": answer.probabilities}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read(paths: list[Path], model: "VisionModel") -> tuple[list[str], Any]:
    """Return the images' names, and the images."""

    from ..training.data.image_arrays import ImageArrays
    from ..training.data.image_files import is_array_file, read_image

    if len(paths) == 1 and is_array_file(paths[0]):
        images = ImageArrays(str(paths[0]), "IMAGE").read_images()
        return [str(number) for number in range(len(images))], images
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ConfigError(f"IMAGE is {str(missing)!r}, which is not there; give another.")
    height, width = model.config.image_size
    found = []
    for path in paths:
        image = read_image(path, model.config.channels)
        if image.shape[:2] != (height, width):
            raise DataError(
                f"{path} has {image.shape[0]} x {image.shape[1]} pixels, but the model reads "
                f"{height} x {width}; bring it to this size."
            )
        found.append(image)
    double = {path.stem for path in paths if [other.stem for other in paths].count(path.stem) > 1}
    if double:
        raise ConfigError(
            f"two images have the name {min(double)!r}, and one answer would replace the other's; "
            "give them in two calls."
        )
    return [str(path) for path in paths], found


def _write(folder: Path, name: str, answer: Any) -> Path:
    """Write a map: classes as an image of their numbers, values as an array."""
    import numpy as np

    if answer.dtype != np.uint8:
        path = folder / f"{name}.npy"
        np.save(path, answer)
        return path
    from ..training.data.image_files import open_pillow

    path = folder / f"{name}.png"
    open_pillow().fromarray(answer).save(path)
    return path
