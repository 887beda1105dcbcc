"""moeyard: sparse Mixture-of-Experts models, trained with torchrun, served with Ray Serve.

Names are loaded when they are first used, so that a command or a worker imports torch only when it
needs it.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import MoeyardError
    from .moe.folders.transformers_blocks import replace_moe_blocks
    from .moe.layer import MoELayer, after_step, auxiliary_loss
    from .moe.models.forecaster import Forecaster
    from .moe.models.language_model import LanguageModel
    from .moe.models.recommender import Recommender
    from .moe.models.series_values import Forecast
    from .moe.models.text_classifier import TextClassifier
    from .moe.models.text_writer import TextWriter
    from .moe.models.upscaler import Upscaler
    from .moe.models.vision_model import VisionModel
    from .moe.routers.hash import Hash
    from .moe.routers.loss_terms import GlobalCounts, LayerLosses
    from .moe.routers.router import Router, RouterConfig, RouterSizes
    from .moe.routers.routing import Lookahead, RouterInput, Routing
    from .moe.routers.table import router
    from .moe.routers.topk import TopK
    from .moe.soft_moe import SoftMoE
    from .serving.load_kinds import (
        load_classifier,
        load_forecaster,
        load_recommender,
        load_seq2seq,
        load_upscaler,
        load_vision,
    )
    from .serving.loading import load

__version__ = "0.1.0"

# After scripts/install Python finds the package through a link. Debuggers and tracebacks should
# name the files where they are edited.
__path__ = [os.path.realpath(folder) for folder in __path__]

__all__ = [
    "Forecast",
    "Forecaster",
    "GlobalCounts",
    "Hash",
    "LanguageModel",
    "LayerLosses",
    "Lookahead",
    "MoELayer",
    "MoeyardError",
    "Recommender",
    "Router",
    "RouterConfig",
    "RouterInput",
    "RouterSizes",
    "Routing",
    "SoftMoE",
    "TextClassifier",
    "TextWriter",
    "TopK",
    "Upscaler",
    "VisionModel",
    "__version__",
    "after_step",
    "auxiliary_loss",
    "load",
    "load_classifier",
    "load_forecaster",
    "load_recommender",
    "load_seq2seq",
    "load_upscaler",
    "load_vision",
    "replace_moe_blocks",
    "router",
]

_HOME = {
    "Forecast": ".moe.models.series_values",
    "Forecaster": ".moe.models.forecaster",
    "GlobalCounts": ".moe.routers.loss_terms",
    "Hash": ".moe.routers.hash",
    "LanguageModel": ".moe.models.language_model",
    "LayerLosses": ".moe.routers.loss_terms",
    "Lookahead": ".moe.routers.routing",
    "MoELayer": ".moe.layer",
    "MoeyardError": ".errors",
    "Recommender": ".moe.models.recommender",
    "Router": ".moe.routers.router",
    "RouterConfig": ".moe.routers.router",
    "RouterInput": ".moe.routers.routing",
    "RouterSizes": ".moe.routers.router",
    "Routing": ".moe.routers.routing",
    "SoftMoE": ".moe.soft_moe",
    "TextClassifier": ".moe.models.text_classifier",
    "TextWriter": ".moe.models.text_writer",
    "TopK": ".moe.routers.topk",
    "Upscaler": ".moe.models.upscaler",
    "VisionModel": ".moe.models.vision_model",
    "after_step": ".moe.layer",
    "auxiliary_loss": ".moe.layer",
    "load": ".serving.loading",
    "load_classifier": ".serving.load_kinds",
    "load_forecaster": ".serving.load_kinds",
    "load_recommender": ".serving.load_kinds",
    "load_seq2seq": ".serving.load_kinds",
    "load_upscaler": ".serving.load_kinds",
    "load_vision": ".serving.load_kinds",
    "replace_moe_blocks": ".moe.folders.transformers_blocks",
    "router": ".moe.routers.table",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
