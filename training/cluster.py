"""Routers by k-means of what a trained model's experts read (Moirai-MoE, Liu et al. 2024).

The model runs on the training data of its run. The rows that enter the MLP of each layer are
collected and clustered, and the clusters' means become the centroids of the layer's router.

N rows, D model width, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..moe.folders.cluster import clustered_config, write_clustered
from ..moe.folders.folder import ModelFolder
from ..moe.gated_mlp import GatedMLP
from ..moe.layer import MoELayer
from ..moe.models.model import Model
from ..moe.models.table import build_model
from ..moe.routers.kmeans import KMeans
from ..moe.routers.kmeans_fit import fit_centroids, nearest
from ..parallel.mesh import Mesh
from .checkpoints.export import export_newest
from .checkpoints.start_from import read_start
from .config import RunConfig
from .objectives.objective import Objective
from .objectives.table import OBJECTIVES
from .read_config import read_run_config
from .stop import StopRequest
from .work import LongWork


class ClusterSettings(BaseModel):
    """How the routers are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int | None = None
    """Experts of a layer; None = those that the model has."""
    k: int = Field(default=2, ge=1)
    """Experts each token visits."""
    choose: Literal["nearest", "farthest"] = "nearest"
    """Which centroids a token chooses; see the router ``kmeans``."""
    rows: int = Field(default=20_000, ge=1)
    """Rows of each layer that are clustered."""
    seed: int = 0
    """Of the first centroids."""


class Clustered(NamedTuple):
    """What was written."""

    model_type: str
    num_rows: int
    """Rows of each layer."""
    explained: tuple[float, ...]
    """By layer: the share of the rows' variance that is between the clusters."""


def cluster(
    run_dir: Path,
    target: Path,
    settings: ClusterSettings,
    data: str | None = None,
    stop: StopRequest | None = None,
) -> Clustered:
    """Write the newest model of a run to ``target``, its routers with centroids.

    ``data`` takes the place of the run's ``data.source``. Raises :class:`ConfigError` for a model
    that has no such layers and for numbers that do not fit, and :class:`DataError` for data with
    fewer rows than clusters.
    """
    stop = stop or StopRequest()
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"RUN_DIR is {str(run_dir)!r}, which is no run; give a trained run.")
    overrides = [] if data is None else [f"data.source={data}"]
    config = read_run_config(run_dir / "config.yaml", overrides)
    if OBJECTIVES[config.data.format].before_training is not Objective.before_training:
        raise ConfigError(
            f"RUN_DIR is {str(run_dir)!r}, a run with data.format {config.data.format}, whose "
            "batches need the weights that it began with; give a run on other data, such as text."
        )
    folder = ModelFolder(export_newest(run_dir))
    try:
        router = KMeans(k=settings.k, choose=settings.choose)
        changed = clustered_config(folder.config, settings.experts, router)
        assert changed.moe is not None, "routers need experts"
        model = build_model(folder.config)
        read_start(str(folder.path), model, config.ignore_unused_weights)
        rows = _rows_of(config, run_dir, model, changed.moe_layers, settings.rows, data, stop)
        centroids, explained = {}, []
        with LongWork("clustering layers", stop, len(rows)) as work:
            for layer, rows_ND in rows.items():
                if len(rows_ND) < changed.moe.num_experts:
                    raise DataError(
                        f"the data have {len(rows_ND)} rows for {changed.moe.num_experts} "
                        "clusters; give more data, or fewer experts."
                    )
                centroids[layer] = fit_centroids(rows_ND, changed.moe.num_experts, settings.seed)
                explained.append(explained_share(rows_ND, centroids[layer]))
                work.advance()
        model_type = write_clustered(folder, target, changed, centroids)
        return Clustered(model_type, len(rows_ND), tuple(explained))
    finally:
        folder.close()


def explained_share(rows_ND: Tensor, centroids_ED: Tensor) -> float:
    """Return 1 less the squared distances to the nearest centroids over those to the mean."""
    rows_ND, centroids_ED = rows_ND.double(), centroids_ED.double()
    left = (rows_ND - centroids_ED[nearest(rows_ND, centroids_ED)]).square().sum()
    total = (rows_ND - rows_ND.mean(dim=0)).square().sum()
    return 1 - float(left / total) if total > 0 else 1.0


def _rows_of(
    config: RunConfig,
    run_dir: Path,
    model: Model,
    layers: list[int],
    count: int,
    data: str | None,
    stop: StopRequest,
) -> dict[int, Tensor]:
    """Return the first ``count`` rows of a run's batches that the MLP of each layer reads."""
    kind: type[Objective[Any]] = OBJECTIVES[config.data.format]
    with TemporaryDirectory() as folder:
        place = run_dir / "data" if data is None else Path(folder)
        opened = kind.open_data(config, place, Mesh(), stop)
        try:
            objective = kind(config, opened)
            loss = objective.module(model).eval()
            found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            batch = range(config.train.batch_sequences)
            with _watching(model, found), torch.no_grad(), LongWork("reading rows", stop) as work:
                for step in range(config.train.steps):
                    opened.train.wait_for(step)
                    loss(objective.batch(step, batch, model.device))
                    work.advance()
                    if sum(map(len, found[layers[0]])) >= count:
                        break
        finally:
            opened.train.close()
    return {layer: torch.cat(parts)[:count] for layer, parts in found.items()}


@contextmanager
def _watching(model: Model, found: dict[int, list[Tensor]]) -> Iterator[None]:
    """Add what enters the MLP of each layer of ``found`` to it."""
    handles = []
    for layer, parts in found.items():
        mlp = model.layers[layer].mlp
        assert isinstance(mlp, GatedMLP | MoELayer), "the configuration says so"

        def keep(_: nn.Module, arguments: tuple[Any, ...], parts: list[Tensor] = parts) -> None:
            parts.append(arguments[0])

        handles.append(mlp.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
