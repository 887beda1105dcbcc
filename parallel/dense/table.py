"""The dense engines that ``parallel.dense`` names."""

from collections.abc import Mapping
from typing import Any

from ..mesh import Mesh
from .deepspeed import Zero
from .engine import DenseEngine
from .fsdp import Sharded
from .replicated import Replicated

ENGINES: dict[str, type[Replicated] | type[Sharded] | type[Zero]] = {
    "ddp": Replicated,
    "fsdp": Sharded,
    "deepspeed": Zero,
}


def open_engine(
    kind: str,
    mesh: Mesh,
    *,
    has_queue: bool = False,
    deepspeed: Mapping[str, Any] | None = None,
) -> DenseEngine:
    """Return a new engine of ``kind``; one process has nothing to split, whatever the kind.

    ``has_queue`` asks for one whose gradients wait in a queue, if links carry them and ``kind`` is
    ddp. ``deepspeed`` is DeepSpeed's configuration.
    """
    if mesh.dp_group is None or kind == "ddp":
        return Replicated(mesh, has_queue=has_queue)
    if kind == "deepspeed":
        assert deepspeed is not None
        return Zero(mesh, deepspeed)
    return Sharded(mesh)
