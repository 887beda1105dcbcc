"""Open the observers that the configuration asks for."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ...moe.config.model import LayersConfig
from ...parallel.mesh import Mesh
from ..config import RunConfig
from .metrics_log import MetricsLog
from .observers import Observer, Observers


def open_observers(
    config: RunConfig,
    model: LayersConfig,
    run_dir: Path,
    mesh: Mesh,
    resume_step: int,
    of_this_rank: Sequence[Observer] = (),
) -> Observers:
    """Open them on rank 0; other ranks get ``of_this_rank`` alone, which rank 0 gets, too.

    Raises :class:`ConfigError` on all ranks.

    ``metrics.jsonl`` is opened last, because that cuts it to ``resume_step``. A refused start must
    not cut it.
    """
    needed: list[Observer] = []
    optional = list(of_this_rank)

    def open_all() -> None:
        monitor = config.monitor
        with ExitStack() as opened:
            if monitor.prometheus_port is not None:
                from .prometheus import PrometheusPort

                optional.append(PrometheusPort(config, model))
                opened.callback(optional[-1].close)
            if monitor.tensorboard:
                from .tensorboard import TensorBoard

                optional.append(TensorBoard(run_dir, resume_step))
                opened.callback(optional[-1].close)
            if monitor.wandb is not None:
                from .weights_and_biases import WeightsAndBiases

                optional.append(WeightsAndBiases(config, run_dir, monitor.wandb))
                opened.callback(optional[-1].close)
            needed.append(MetricsLog(run_dir, resume_step))
            opened.pop_all()

    mesh.on_rank_0(open_all)
    return Observers(needed, optional)
