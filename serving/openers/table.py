"""The openers by kind of model. A new kind is a file next to this and a line here."""

from .decoder import DECODER
from .encoder import ENCODER
from .encoder_decoder import ENCODER_DECODER
from .opener import Opener
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
}
