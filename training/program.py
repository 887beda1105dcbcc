"""One training process from its configuration to its end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import TrainingError
from ..moe.experts.streamed import OpenSource
from ..parallel.mesh import build_mesh
from ..parallel.process import process_group
from .config import RunConfig
from .run.agreement import check_same_start
from .run.allocator import keep_freed_memory
from .run.folder import claim_run_folder
from .run.shared_folder import check_shared_folder
from .stop import StopRequest
from .trainer import Trainer


def train(
    config: RunConfig, open_source: OpenSource | None, stop: StopRequest | None = None
) -> None:
    """Run one training process to its end.

    ``open_source`` opens the experts of a run with ``train.expert_memory``. ``stop`` is the request
    of a caller that listens for signals already.
    """
    if stop is None:
        stop = StopRequest()
        stop.listen()
    keep_freed_memory()
    timeout_s = config.parallel.timeout_s
    claims: list[int] = []
    try:
        with process_group(timeout_s, stop) as watch, _memory_of_a_gpu():
            check_same_start(config, watch)
            num_experts = config.model.moe.num_experts if config.model.moe is not None else 1
            degrees = {"expert_tp": config.parallel.expert_tp, "pp": config.parallel.pp}
            mesh = build_mesh(config.parallel.ep, num_experts, watch, timeout_s, **degrees)
            run_dir = Path(config.run_dir)
            mesh.on_rank_0(lambda: claims.append(claim_run_folder(run_dir)))
            check_shared_folder(run_dir, watch)
            Trainer(config, run_dir, mesh, stop, open_source=open_source).run()
    finally:
        for claim in claims:
            os.close(claim)


@contextmanager
def _memory_of_a_gpu() -> Iterator[None]:
    """Raise :class:`TrainingError` where a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        sentences = " ".join(str(error).split()).split(". ")
        tried = next((s for s in sentences if s.startswith("Tried")), sentences[0])
        raise TrainingError(
            f"the GPU's memory does not suffice ({tried.rstrip('.')}); raise train.accumulation, "
            "set train.recompute to true or parallel.dense to fsdp, or use more GPUs with a larger "
            "parallel.ep."
        ) from error
