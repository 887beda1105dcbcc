"""Open a model that enlarges images."""

from ...moe.folders.folder import ModelFolder
from ...moe.models.super_resolution import SuperResolution
from ...moe.models.upscaler import Upscaler
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener, refuse_correction


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> Upscaler:
    model = filled.model
    assert isinstance(model, SuperResolution), "its configuration is that of one"
    refuse_correction(files, options)
    return Upscaler(model)


SUPER_RESOLUTION = Opener(
    _open, "a super-resolution model", "moeyard upscale or moeyard.load_upscaler"
)
