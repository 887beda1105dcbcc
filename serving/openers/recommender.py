"""Open an encoder-decoder that recommends items."""

from pathlib import Path

from ...errors import ModelFileError
from ...files import read_small_file
from ...moe.folders.folder import ModelFolder
from ...moe.items import shape, table
from ...moe.models.encoder_decoder import EncoderDecoder
from ...moe.models.recommender import Recommender

MOST_BYTES = 1 << 16
"""Of the sizes of sessions."""


def recommends(files: ModelFolder) -> bool:
    """Whether a folder has a table of items, which its model recommends."""
    return (files.path / table.FILE).is_file()


def open_recommender(files: ModelFolder, model: EncoderDecoder) -> Recommender:
    """Return the model with the items of its folder."""
    path = files.path / shape.FILE
    items = table.open_table(files.path, "the model's folder")
    return Recommender(model, items, shape.read_shape(_text(path), str(path)))


def _text(path: Path) -> str:
    try:
        return read_small_file(path, MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ModelFileError(f"{path} cannot be read ({reason}); export the run again.") from None
