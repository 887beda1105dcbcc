"""``moeyard upscale``: larger images."""

import argparse
import sys
import time
from pathlib import Path

from ..errors import ConfigError
from .options import Parsers, add_command, add_loading, add_model


def add(parsers: Parsers) -> None:
    """Add the command."""
    upscale = add_command(parsers, "upscale", "enlarge images with a super-resolution model")
    add_model(upscale)
    upscale.add_argument(
        "source", type=Path, metavar="IN", help="an image file, or .npz with an array of bytes"
    )
    upscale.add_argument(
        "target", type=Path, metavar="OUT", help="the file to write: .png or another kind, or .npz"
    )
    upscale.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps of DDIM; default: 20"
    )
    upscale.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the noise it begins with; default: 0"
    )
    upscale.add_argument(
        "--eta",
        type=float,
        default=0.0,
        metavar="X",
        help="share of fresh noise in a step, 0 to 1; default: 0.0",
    )
    upscale.add_argument(
        "--batch", type=int, default=16, metavar="N", help="tiles computed together; default: 16"
    )
    upscale.add_argument(
        "--images-key",
        default="images",
        metavar="NAME",
        help="name of the array in .npz files; default: images",
    )
    add_loading(upscale)
    upscale.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the images, enlarge them and write the file."""
    from ..training.data.image_files import is_array_file, read_bytes, read_images, write_images
    from .model_folder import open_kind_of

    source: Path = arguments.source
    if not source.is_file():
        raise ConfigError(f"IN is {str(source)!r}, which is not a file; give another.")
    if is_array_file(source) and not is_array_file(arguments.target):
        raise ConfigError(
            f"OUT is {str(arguments.target)!r}, but IN is a .npz file; name a .npz file."
        )
    upscaler = open_kind_of(arguments, "super_resolution")
    channels = upscaler.config.channels
    if is_array_file(source):
        images = read_images(str(source), "IN", arguments.images_key, channels)
    else:
        images = read_bytes(source, channels)[None]
    started = time.perf_counter()
    large = upscaler(images, arguments.steps, arguments.seed, arguments.eta, arguments.batch)
    seconds = time.perf_counter() - started
    write_images(arguments.target, large, arguments.images_key)
    sys.stderr.write(
        f"event=upscaled images={len(large)} width={large.shape[2]} height={large.shape[1]} "
        f"seconds={seconds:.1f}\n"
    )
