"""Open an encoder-decoder that recommends items."""

from pathlib import Path

from ...errors import ModelFileError
from ...files import read_small_file
from ...moe.folders.folder import ModelFolder
from ...moe.items import shape, table
from ...moe.models.encoder_decoder import EncoderDecoder
from ...moe.models.recommender import Recommender
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener, refuse_correction

MOST_BYTES = 1 << 16
"""Of the sizes of sessions."""


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> Recommender:
    model = filled.model
    assert isinstance(model, EncoderDecoder), "its configuration is an encoder-decoder's"
    refuse_correction(files, options)
    path = files.path / shape.FILE
    items = table.open_table(files.path, "the model's folder")
    return Recommender(model, items, shape.read_shape(_text(path), str(path)))


def _text(path: Path) -> str:
    try:
        return read_small_file(path, MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ModelFileError(f"{path} cannot be read ({reason}); export the run again.") from None


RECOMMENDER = Opener(
    _open,
    "a recommender of sessions",
    "moeyard recommend or moeyard.load_recommender",
)
