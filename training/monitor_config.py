"""The ``monitor`` section of a run: who watches it."""

from pydantic import Field

from .section import Section


class RoutesConfig(Section):
    """Route files in ``RUN_DIR/routes``, one for each rank: which experts every token visited."""

    every: int = Field(default=1, ge=1)
    """Steps between recorded steps."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    """Largest size of a rank's file; later steps are not recorded."""
    weights: bool = True
    """Record the weights of the choices too, in fp32. Ids alone take a third to a fifth of the
    room and are all that a replay needs."""


class MonitorConfig(Section):
    """Who watches the run, in addition to the console and ``metrics.jsonl``."""

    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of ``/metrics`` on rank 0's host; None = no port is opened."""
    prometheus_host: str = "127.0.0.1"
    """Address to listen on. There is no key, so open more than the loopback with care."""
    tensorboard: bool = False
    """Write event files into ``RUN_DIR/tensorboard``."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases to log to; ``WANDB_MODE=offline`` keeps everything local."""
    routes: RoutesConfig | None = None
    """Record which experts every token visits; ``{}`` records all steps."""
