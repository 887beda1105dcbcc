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
    from .moe.models.language_model import LanguageModel
    from .moe.models.recommender import Recommender
    from .moe.models.text_classifier import TextClassifier
    from .moe.models.text_writer import TextWriter
    from .moe.routers.hash import Hash
    from .moe.routers.loss_terms import GlobalCounts, LayerLosses
    from .moe.routers.router import Router, RouterConfig, RouterSizes
    from .moe.routers.routing import Lookahead, RouterInput, Routing
    from .moe.routers.table import router
    from .moe.routers.topk import TopK
    from .moe.soft_moe import SoftMoE
    from .serving.loading import load, load_classifier, load_recommender, load_seq2seq

__version__ = "0.1.0"

# After scripts/install Python finds the package through a link. Debuggers and tracebacks should
# name the files where they are edited.
__path__ = [os.path.realpath(folder) for folder in __path__]

__all__ = [
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
    "__version__",
    "after_step",
    "auxiliary_loss",
    "load",
    "load_classifier",
    "load_recommender",
    "load_seq2seq",
    "replace_moe_blocks",
    "router",
]

_HOME = {
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
    "after_step": ".moe.layer",
    "auxiliary_loss": ".moe.layer",
    "load": ".serving.loading",
    "load_classifier": ".serving.loading",
    "load_recommender": ".serving.loading",
    "load_seq2seq": ".serving.loading",
    "replace_moe_blocks": ".moe.folders.transformers_blocks",
    "router": ".moe.routers.table",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
