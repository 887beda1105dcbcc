"""The dense engines that ``parallel.dense`` names."""

from ..mesh import Mesh
from .engine import DenseEngine
from .fsdp import Sharded
from .replicated import Replicated

ENGINES: dict[str, type[Replicated] | type[Sharded]] = {
    "ddp": Replicated,
    "fsdp": Sharded,
}


def open_engine(kind: str, mesh: Mesh) -> DenseEngine:
    """Return a new engine of ``kind``; one process has nothing to split, whatever the kind."""
    if mesh.dp_group is None:
        return Replicated(mesh)
    return ENGINES[kind](mesh)
