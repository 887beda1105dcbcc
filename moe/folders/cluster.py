"""A folder whose routers have centroids that were found in a trained model (Moirai-MoE).

Experts that the model has stay. A dense model's MLP becomes every expert of its layer, so that the
new model begins as the same function: weights of a choice add up to 1, and all experts are alike.

E experts, D model width.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config.model import LayersConfig, check_gated_mlps
from ..config.moe import MOST_EXPERTS, MoEConfig
from ..routers.kmeans import KMeans
from .changed import write_changed
from .folder import ModelFolder
from .write_weights import FolderWeights


def clustered_config(source: LayersConfig, num_experts: int | None, router: KMeans) -> LayersConfig:
    """Return the configuration of ``source`` with ``router`` in every layer that has experts.

    A dense model gets ``num_experts`` in all layers. Raises :class:`ConfigError` for a number that
    does not fit.
    """
    moe = source.moe
    if moe is None:
        if num_experts is None:
            raise ConfigError("the model is dense; give the number of experts, such as 8.")
        if not 1 <= num_experts <= MOST_EXPERTS:
            raise ConfigError(f"experts is {num_experts}; use 1 to {MOST_EXPERTS}.")
        _check_choices(router, num_experts)
        check_gated_mlps(source)
        assert source.d_ff is not None, "the configuration was validated"
        moe = MoEConfig(num_experts=num_experts, d_expert=source.d_ff, router=router)
        return source.model_copy(update={"moe": moe, "dense_layers": ()})
    if num_experts not in (None, moe.num_experts):
        raise ConfigError(
            f"experts is {num_experts}, but the model has {moe.num_experts} in a layer already; "
            "leave it out."
        )
    _check_choices(router, moe.num_experts)
    return source.model_copy(update={"moe": moe.model_copy(update={"router": router})})


def _check_choices(router: KMeans, num_experts: int) -> None:
    problem = router.problem_with(num_experts)
    if problem is not None:
        raise ConfigError(problem)


def write_clustered(
    folder: ModelFolder, target: Path, config: LayersConfig, centroids: Mapping[int, Tensor]
) -> str:
    """Write the open ``folder`` with ``config`` to ``target``, and return its ``model_type``.

    ``centroids`` has ``[E, D]`` for each layer with experts.
    """
    weights = ClusteredWeights(folder, centroids)
    return write_changed(folder.path, folder, target, config, weights)


class ClusteredWeights:
    """The weights of a folder, with other routers, and with experts if it has none."""

    def __init__(self, folder: ModelFolder, centroids: Mapping[int, Tensor]) -> None:
        self._source = FolderWeights(folder, folder.dtype)
        self._is_dense = folder.config.moe is None
        self._centroids = centroids
        self._last: tuple[str, Tensor] | None = None

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor outside the experts; routers have the centroids."""
        for layer, centroids_ED in self._centroids.items():
            if parameter == f"layers.{layer}.mlp.gate.centroids_ED":
                return centroids_ED
            if parameter == f"layers.{layer}.mlp.gate.idle_steps_E":
                return torch.zeros(len(centroids_ED), dtype=torch.int64)
        return self._source.dense(parameter)

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a part of an expert, or of the dense MLP, which is kept for the next expert."""
        if not self._is_dense:
            return self._source.expert_part(layer, expert, part)
        name = f"layers.{layer}.mlp.{part}_proj.weight"
        if self._last is None or self._last[0] != name:
            self._last = name, self._source.dense(name)
        return self._last[1]
