"""Open a vision transformer that does tasks on images."""

from ...moe.folders.folder import ModelFolder
from ...moe.models.vision_model import VisionModel
from ...moe.models.vit import ViT
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener, refuse_correction


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> VisionModel:
    vit = filled.model
    assert isinstance(vit, ViT), "its configuration is a vision transformer's"
    refuse_correction(files, options)
    return VisionModel(vit)


VIT = Opener(_open, "a vision transformer", "moeyard predict or moeyard.load_vision")
