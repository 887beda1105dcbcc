"""Open a decoder that continues texts."""

import logging

from ...moe.folders.adapters import adapter_table
from ...moe.folders.folder import ModelFolder
from ...moe.folders.generation_config import read_generation_config
from ...moe.folders.text_codec import TextCodec
from ...moe.models.correction import Correction
from ...moe.models.decoder import Decoder
from ...moe.models.language_model import LanguageModel
from ...moe.models.sampling import GenerationConfig
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener

log = logging.getLogger(__name__)


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> LanguageModel:
    decoder = filled.model
    assert isinstance(decoder, Decoder), "its configuration is a decoder's"
    table = adapter_table(decoder, files.family)
    model = LanguageModel(decoder, _generation(files), TextCodec(files.path), table)
    if filled.fallback is not None and options.correction is not None:
        on = filled.fallback.on
        model.correction = Correction(options.correction, on, options.correction_threshold)
    return model


def _generation(files: ModelFolder) -> GenerationConfig:
    """Read how the model generates, and warn of what cannot be followed."""
    generation = read_generation_config(files)
    if generation.unknown_eos_ids:
        log.warning(
            "eos_token_id has %s, but ids go up to %d, so no answer ends there.",
            ", ".join(map(str, generation.unknown_eos_ids)),
            files.config.vocabulary - 1,
        )
    if generation.not_followed:
        log.warning(
            "generation_config.json asks for %s, which is not offered; answers do without.",
            " and ".join(generation.not_followed),
        )
    return generation


DECODER = Opener(_open, "a decoder", "moeyard generate or moeyard.load")
