"""Start the ranks of a run on this machine, as torchrun does, with quieter endings."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import MoeyardError

SAVING_LIMIT_S = 600
"""Time for ranks to save after a signal; then they are killed. torchrun gives 30 s."""


def run_ranks(module: str, arguments: Sequence[str], num_ranks: int) -> int:
    """Run ``python -m module`` in ``num_ranks`` processes until all have ended.

    Returns 0 if all ended well or a signal ended them, otherwise the status of the first rank that
    failed. A failed rank has said why. Raises :class:`MoeyardError` for ranks that a signal killed.
    """
    # torchrun sets one thread per rank; the ranks share the cores.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_LIMIT_S))
    for name in list(logging.root.manager.loggerDict):  # each has a level, and none inherits
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException:
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise MoeyardError(
                f"rank {rank} was ended by {name}, and so the run; start it again to go on from "
                "its last checkpoint."
            ) from None
        return int(failure.exitcode)
    return 0
