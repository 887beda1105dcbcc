"""The images of a run that enlarges them: read once, by rank 0, into the run folder.

N images, B rows of a batch, C channels, S sides of a crop.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ...errors import DataError
from ...files import replaced
from ...moe.config.super_resolution import SuperResolutionConfig
from ...moe.diffusion.images import from_bytes, larger, smaller
from ...moe.models.initialize import generator_of
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..formats.super_resolution import SuperResolutionDataConfig
from ..stop import StopRequest
from ..work import LongWork
from .corpus import make_folder
from .data import Data
from .documents import Files
from .held_out import every_nth
from .image_files import Bytes, image_paths, read_images
from .origins import are_made_from, origin_of
from .shuffled import ShuffledItems

TRAIN, HELD_OUT = "images-train.safetensors", "images-eval.safetensors"
GOLDEN = 0.6180339887498949
"""Steps of this length spread evenly over a circle, however many there are."""


class ImageRows(NamedTuple):
    """Crops with their noise, before they are mixed. Moved between devices as a whole."""

    images_BCSS: Tensor
    """fp32, from -1 to 1."""
    noise_BCSS: Tensor
    """fp32, standard normal."""
    times_B: Tensor
    """int64 timesteps."""
    draw_keys: tuple[int, ...]
    """What routers draw from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData(Data):
    """Images."""

    train: "Images"
    held_out: "Images"
    residual_std: float
    """Of the training images; see :attr:`.SuperResolutionConfig.residual_std`."""


class Images(ShuffledItems):
    """The images of a file, and what is drawn of them."""

    def __init__(self, path: Path, model: SuperResolutionConfig, batch: int, seed: int) -> None:
        """``batch`` is the rows of a global batch."""
        with safe_open(path, "np") as file:
            self._images_NHWC = file.get_tensor("images_NHWC")
            self.residual_std = float((file.metadata() or {})["residual_std"])
        self._side, self._timesteps = model.image_size, model.timesteps
        self._seed = seed
        super().__init__(len(self._images_NHWC), batch, seed)
        digest = hashlib.sha256(str(self._images_NHWC.shape).encode())
        digest.update(self._images_NHWC.tobytes())
        self.identity = digest.hexdigest()

    def of_step(self, step: int, rows: range) -> ImageRows:
        """Return some rows of the global batch of ``step``: a crop of an image each.

        Crop, timestep and noise depend on the seed, the step and the row alone.
        """
        crops, keys, times, noise = [], [], [], []
        for row, image in zip(rows, self.at(step, rows), strict=True):
            generator = generator_of(f"{self._seed}/images/{step}/{row}")
            image_HWC = self._images_NHWC[image]
            most = [side - self._side + 1 for side in image_HWC.shape[:2]]
            up, along = (int(torch.randint(count, (), generator=generator)) for count in most)
            crops.append(image_HWC[up : up + self._side, along : along + self._side])
            times.append(int(torch.randint(self._timesteps, (), generator=generator)))
            keys.append(generator.initial_seed())
            noise.append(self._noise(generator))
        return self._together(crops, noise, times, keys)

    def fixed(self, images: list[int]) -> ImageRows:
        """Return the middles of images with the timesteps and the noise of every evaluation."""
        crops = [self.middle(image) for image in images]
        times = [int(((image + 0.5) * GOLDEN) % 1 * self._timesteps) for image in images]
        noise = [self._noise(generator_of(f"held-out/{image}")) for image in images]
        return self._together(crops, noise, times, images)

    def middle(self, image: int) -> Bytes:
        """Return the crop in the middle of an image, ``[S, S, C]``."""
        image_HWC = self._images_NHWC[image]
        up, along = ((side - self._side) // 2 for side in image_HWC.shape[:2])
        return image_HWC[up : up + self._side, along : along + self._side]

    def _noise(self, generator: torch.Generator) -> Tensor:
        channels = self._images_NHWC.shape[3]
        return torch.randn(channels, self._side, self._side, generator=generator)

    def _together(
        self, crops: list[Bytes], noise: list[Tensor], times: list[int], keys: list[int]
    ) -> ImageRows:
        shape = (0, self._images_NHWC.shape[3], self._side, self._side)
        return ImageRows(
            from_bytes(np.stack(crops)) if crops else torch.zeros(shape),
            torch.stack(noise) if noise else torch.zeros(shape),
            torch.tensor(times, dtype=torch.int64),
            tuple(keys),
        )


def build_image_data(
    config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
) -> ImageData:
    """Prepare the images on rank 0 and open them on all ranks.

    Raises :class:`Stopped` on all ranks if rank 0 is asked to stop, and :class:`DataError` for
    images that cannot be trained on.
    """
    data, model = config.data, config.model
    assert isinstance(data, SuperResolutionDataConfig), "its format asks for this objective"
    assert isinstance(model, SuperResolutionConfig), "check() compares the kinds"
    mesh.on_rank_0(lambda: _prepare(data, model, folder, stop or StopRequest()))
    facts = (model, config.train.batch_sequences, config.seed)
    train, held_out = Images(folder / TRAIN, *facts), Images(folder / HELD_OUT, *facts)
    if mesh.rank == 0:
        counts = f"images={len(train)} held_out={len(held_out)}"
        sys.stderr.write(f"event=images {counts} residual_std={train.residual_std}\n")
    return ImageData(
        tokenizer=None,
        train=train,
        identity=train.identity,
        num_train_tokens=len(train) * model.rows_per_image,
        held_out_identity=held_out.identity,
        held_out=held_out,
        residual_std=train.residual_std,
    )


def _prepare(
    data: SuperResolutionDataConfig, model: SuperResolutionConfig, folder: Path, stop: StopRequest
) -> None:
    """Write both files unless they are there and were made from the same."""
    make_folder(folder)
    sources = [source for source in (data.source, data.eval_source) if source is not None]
    prints = [_print_of(Path(source)) for source in sources]
    settings = [data.images_key, data.eval_fraction, model.channels, model.scale, model.image_size]
    origin = origin_of([prints, settings])
    paths = (folder / TRAIN, folder / HELD_OUT)
    if are_made_from(paths, origin, prints):
        return
    with LongWork("reading images", stop) as work:
        parts = _split(data, model, work)
    std = residual_std(parts[0], model.scale)
    for path, images_NHWC in zip(paths, parts, strict=True):
        metadata = {"made_from": origin, "residual_std": repr(std)}
        with replaced(path) as unfinished:
            save_file({"images_NHWC": images_NHWC}, unfinished, metadata=metadata)


def _print_of(source: Path) -> str | None:
    paths = image_paths(source) if source.is_dir() else [source]
    return Files(paths, str(source), "", "data.source").fingerprint()


def _split(
    data: SuperResolutionDataConfig, model: SuperResolutionConfig, work: LongWork
) -> tuple[Bytes, Bytes]:
    """Return the images to train on and those held out, whose copies are not trained on.

    Every n-th image is held out: the middle one of n.
    """
    read: list[Bytes] = []
    for source, field in ((data.source, "data.source"), (data.eval_source, "data.eval_source")):
        if source is not None:
            read.append(read_images(source, field, data.images_key, model.channels, work.advance))
            _check_sides(read[-1], field, model.image_size)
    own = read[0]
    every = every_nth(data.eval_fraction)
    held_out = read[1] if len(read) > 1 else own[every // 2 :: every]
    copies = {image.tobytes() for image in held_out}
    is_copy = np.array([image.tobytes() in copies for image in own])
    train = own[~is_copy]
    for part, name in ((held_out, "hold out"), (train, "train on")):
        if not len(part):
            raise DataError(
                f"data.source is {data.source!r}, whose {len(own)} image(s) leave none to {name}; "
                "give more that differ, or data.eval_source."
            )
    return train, held_out


def _check_sides(images_NHWC: Bytes, field: str, least: int) -> None:
    height, width = images_NHWC.shape[1:3]
    if min(height, width) < least:
        raise DataError(
            f"{field} has images of {width} x {height} pixels, but model.image_size is {least}; "
            "give larger images or lower it."
        )


def residual_std(images_NHWC: Bytes, scale: int, most: int = 256) -> float:
    """Return the standard deviation of images minus their enlarged small copies.

    Of at most ``most`` images; 6 digits, so that it does not depend on the machine.
    """
    chosen = images_NHWC[:: max(1, len(images_NHWC) // most)][:most]
    height, width = (side - side % scale for side in chosen.shape[1:3])
    images = from_bytes(chosen[:, :height, :width])
    std = float((images - larger(smaller(images, scale), scale)).double().square().mean().sqrt())
    return float(f"{max(std, 1e-3):.6g}")
