"""Open an encoder-decoder that reads texts and writes texts."""

from ...moe.folders.folder import ModelFolder
from ...moe.folders.generation_config import read_generation_config
from ...moe.folders.source_texts import SourceTexts
from ...moe.models.encoder_decoder import EncoderDecoder
from ...moe.models.text_writer import TextWriter
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener, refuse_correction


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> TextWriter:
    model = filled.model
    assert isinstance(model, EncoderDecoder), "its configuration is an encoder-decoder's"
    refuse_correction(files, options)
    codec = SourceTexts(files.path)
    eos_ids = read_generation_config(files).eos_ids or {codec.end_id}
    return TextWriter(model, codec, eos_ids)


ENCODER_DECODER = Opener(
    _open, "an encoder-decoder of texts", "moeyard translate or moeyard.load_seq2seq"
)
