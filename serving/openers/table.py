"""The openers by kind of model. A new kind is a file next to this and a line here."""

from ...moe.folders.folder import ModelFolder
from ...moe.items.table import FILE as ITEMS
from .decoder import DECODER
from .encoder import ENCODER
from .encoder_decoder import ENCODER_DECODER
from .opener import Opener
from .recommender import RECOMMENDER
from .series import SERIES, SERIES_KINDS
from .super_resolution import SUPER_RESOLUTION
from .vit import VIT

OPENERS: dict[str, Opener] = {
    "decoder": DECODER,
    "encoder": ENCODER,
    **dict.fromkeys(SERIES_KINDS, SERIES),
    "encoder_decoder": ENCODER_DECODER,
    "vit": VIT,
    "super_resolution": SUPER_RESOLUTION,
    "recommender": RECOMMENDER,
}


def opener_of(files: ModelFolder) -> str:
    """Return the opener of a folder: its kind of model, or what its other files make of it."""
    is_recommender = files.config.kind == "encoder_decoder" and (files.path / ITEMS).is_file()
    return "recommender" if is_recommender else files.config.kind
