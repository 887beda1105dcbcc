"""The openers by kind of model. A new kind is a file next to this and a line here."""

from .decoder import DECODER
from .encoder import ENCODER
from .opener import Opener
from .series import SERIES, SERIES_KINDS

OPENERS: dict[str, Opener] = {
    "decoder": DECODER,
    "encoder": ENCODER,
    **dict.fromkeys(SERIES_KINDS, SERIES),
}
