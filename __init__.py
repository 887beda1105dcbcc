"""moeyard: sparse Mixture-of-Experts models, trained with torchrun, served with Ray Serve."""

from .errors import MoeyardError
from .moe.layer import MoELayer
from .moe.router import Hash, TopK
from .moe.routing import Routing
from .serving.loading import load

__version__ = "0.1.0"

__all__ = ["Hash", "MoELayer", "MoeyardError", "Routing", "TopK", "__version__", "load"]
