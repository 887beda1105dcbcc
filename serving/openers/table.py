"""The openers by kind of model. A new kind is a file next to this and a line here."""

from .decoder import DECODER
from .encoder import ENCODER
from .encoder_decoder import ENCODER_DECODER
from .opener import Opener

OPENERS: dict[str, Opener] = {
    "decoder": DECODER,
    "encoder": ENCODER,
    "encoder_decoder": ENCODER_DECODER,
}
