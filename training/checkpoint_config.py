"""When checkpoints are written, and how many stay."""

from pydantic import Field

from .section import Section


class CheckpointConfig(Section):
    """Restartable checkpoints."""

    every: int = Field(default=200, ge=1)
    """Steps between checkpoints; the last step always writes one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    asynchronous: bool = False
    """Write checkpoints while training goes on. Training stops only until the tensors are copied,
    so each rank keeps a second copy of its part in host memory. A save that is due while the last
    one is being written waits for it. The last save of a run is written at once."""
