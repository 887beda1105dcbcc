"""The dense engines that ``parallel.dense`` names."""

from ..mesh import Mesh
from .engine import DenseEngine
from .fsdp import Sharded
from .replicated import Replicated

ENGINES: dict[str, type[Replicated] | type[Sharded]] = {
    "ddp": Replicated,
    "fsdp": Sharded,
}


def open_engine(kind: str, mesh: Mesh, *, has_queue: bool = False) -> DenseEngine:
    """Return a new engine of ``kind``; one process has nothing to split, whatever the kind.

    ``has_queue`` asks for one whose gradients wait in a queue, if links carry them and ``kind`` is
    ddp.
    """
    if mesh.dp_group is None or kind == "ddp":
        return Replicated(mesh, has_queue=has_queue)
    return ENGINES[kind](mesh)
