"""moeyard: sparse Mixture-of-Experts models, trained with torchrun, served with Ray Serve.

Names are loaded when they are first used, so that starting a command or a worker costs no import
of torch before it is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import MoeyardError
    from .moe.layer import MoELayer, auxiliary_loss
    from .moe.routers.config import Hash, TopK
    from .moe.routers.routing import Routing
    from .serving.loading import load

__version__ = "0.1.0"

__all__ = [
    "Hash",
    "MoELayer",
    "MoeyardError",
    "Routing",
    "TopK",
    "__version__",
    "auxiliary_loss",
    "load",
]

_HOME = {
    "Hash": ".moe.routers.config",
    "MoELayer": ".moe.layer",
    "MoeyardError": ".errors",
    "Routing": ".moe.routers.routing",
    "TopK": ".moe.routers.config",
    "auxiliary_loss": ".moe.layer",
    "load": ".serving.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
