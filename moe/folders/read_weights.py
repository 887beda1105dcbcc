"""Fill a decoder from a model folder, tensor by tensor, straight into the memory that keeps it."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import ModelFileError
from ...kernels.values.few_bits import MatrixView
from ...kernels.values.memory import prefer_huge_pages
from ...progress import Progress
from ..config.model import LayersConfig
from ..models.model import Model
from .expert_hashes import DamagedExpertError
from .expert_layouts import ExpertViews
from .folder import ModelFolder
from .tensor_names import ROUTER, is_router

WeightRead = tuple[int, Callable[[], None]]
"""Bytes of memory that a call fills, and the call."""

MOST_THREADS = 3
"""Threads. Each may hold an expert in the folder's type."""
RUN_BYTES = 8 << 20
"""Bytes that a thread fills in one go; with less, threads wait for each other's huge pages."""


def run_reads(folder: ModelFolder, reads: Iterable[WeightRead]) -> None:
    """Run the calls, a few at a time, and show the progress.

    Several threads, because the first touch of fresh memory costs as much as reading from a warm
    page cache. Raises :class:`ModelFileError` for the first call that fails.
    """
    runs = list(_runs(reads))
    num_threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    total = sum(num_bytes for num_bytes, _ in runs)
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="read-weights") as pool,
        Progress("loading", total, in_bytes=True) as progress,
    ):
        waiting = {pool.submit(run): num_bytes for num_bytes, run in runs}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                    progress.advance(waiting.pop(future))
        except DamagedExpertError as error:
            raise ModelFileError(f"{folder.path}: {error}.") from None
        except OSError as error:
            raise ModelFileError(f"{folder.path} could not be read: {error}.") from None
        finally:
            for future in waiting:
                future.cancel()


def _runs(reads: Iterable[WeightRead]) -> Iterator[WeightRead]:
    """Join neighbouring calls."""
    calls: list[Callable[[], None]] = []
    num_bytes = 0
    for more, call in reads:
        calls.append(call)
        num_bytes += more
        if num_bytes >= RUN_BYTES:
            yield num_bytes, partial(_make_all, calls)
            calls, num_bytes = [], 0
    if calls:
        yield num_bytes, partial(_make_all, calls)


def _make_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def dense_reads(folder: ModelFolder, decoder: Model, dtype: torch.dtype) -> Iterator[WeightRead]:
    """Allocate every tensor outside the experts in ``dtype``, and yield the calls that fill them.

    For inference. Routers keep their type in the decoder.
    """
    for name, meta in [*decoder.named_parameters(), *decoder.named_buffers()]:
        if not meta.is_meta and isinstance(meta, nn.Parameter):
            continue  # experts have their memory already
        keeps_type = not meta.is_floating_point() or is_router(name)
        target = torch.empty(meta.shape, dtype=meta.dtype if keeps_type else dtype)
        prefer_huge_pages(target)
        owner_name, _, leaf = name.rpartition(".")
        owner = decoder.get_submodule(owner_name)
        if isinstance(meta, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(target, requires_grad=False))
        else:
            owner.register_buffer(leaf, target)
        yield target.nbytes, partial(read_tensor, folder, name, target)
    decoder.tie()


def read_tensor(folder: ModelFolder, name: str, target: Tensor) -> None:
    """Fill ``target`` with one of the decoder's tensors outside the experts."""
    folder.read_into(name, target)
    if is_router(name):
        _check_router(name, target, folder.config)


def expert_reads(
    folder: ModelFolder, layer: int, views_of: Iterable[tuple[int, ExpertViews]]
) -> Iterator[WeightRead]:
    """Yield the calls that fill experts of a layer, given as logical expert and views."""
    for expert, views in views_of:
        num_bytes = sum(_bytes_of(view) for view in views.values())
        yield num_bytes, partial(_read_expert, folder, layer, expert, views)


def _read_expert(folder: ModelFolder, layer: int, expert: int, views: ExpertViews) -> None:
    for read in folder.expert_reads(layer, expert, views):
        read()


def _bytes_of(view: Tensor | MatrixView) -> int:
    return view.nbytes if isinstance(view, Tensor) else sum(part.nbytes for part in view)


def _check_router(name: str, tensor: Tensor, config: LayersConfig) -> None:
    assert config.moe is not None, "only MoE models have routers"
    own_name = name.partition(ROUTER)[2]
    problem = config.moe.router.problem_with_tensor(own_name, tensor, config.moe.num_experts)
    if problem is not None:
        raise ModelFileError(f"{name} {problem}.")
