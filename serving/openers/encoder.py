"""Open an encoder that classifies texts."""

from ...moe.folders.folder import ModelFolder
from ...moe.folders.marked_texts import MarkedTexts
from ...moe.models.encoder import Encoder
from ...moe.models.text_classifier import TextClassifier
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener, refuse_correction


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> TextClassifier:
    encoder = filled.model
    assert isinstance(encoder, Encoder), "its configuration is an encoder's"
    refuse_correction(files, options)
    return TextClassifier(encoder, MarkedTexts(files.path))


ENCODER = Opener(_open, "an encoder", "moeyard classify or moeyard.load_classifier")
