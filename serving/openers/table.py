"""The openers by kind of model. A new kind is a file next to this and a line here."""

from .decoder import DECODER
from .encoder import ENCODER
from .opener import Opener
from .super_resolution import SUPER_RESOLUTION

OPENERS: dict[str, Opener] = {
    "decoder": DECODER,
    "encoder": ENCODER,
    "super_resolution": SUPER_RESOLUTION,
}
