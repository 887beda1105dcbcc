"""Sparse upcycling: a dense folder becomes a Mixture-of-Experts folder that is the same function.

Komatsuzaki et al. 2023 copy a dense MLP into every expert. Fine-grained experts (He et al. 2024)
are slices of it: with S slices, experts ``c*S .. c*S + S-1`` are copy c of the whole MLP, and
expert e holds slice ``e mod S``. All experts of a copy begin with the same router row; training
moves the rows apart.

Why the first forward equals the dense one, whatever the router's rows are:

1. The S experts of a copy have equal logits. So the K = S * k' largest logits belong to k' whole
   copies, as long as no two copies tie.
2. Where copies tie, the C++ and Triton kernels take the lower id, and the ids of a copy are
   neighbours, so whole copies are taken again. ``torch.topk`` has no such rule, but random rows tie
   only for an input of zeros, for which all experts return zero.
3. Weights are equal within a copy and sum to 1 over all, so the weighted sum is 1/S of the dense
   output. Down projections are therefore multiplied by S, without rounding if S is a power of two.

Two other routers take one copy, cut into E slices. upcycle_routers.py has them.

E experts, K choices, S slices, D model width, F expert width.
"""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config.model import LayersConfig, check_gated_mlps
from ..config.moe import MOST_EXPERTS, MoEConfig
from ..models.initialize import generator_of
from .changed import write_changed
from .folder import ModelFolder
from .hub import local_folder
from .upcycle_routers import UPCYCLE_ROUTERS, UpcycleRouter
from .write_weights import FolderWeights

log = logging.getLogger(__name__)

MoELayers = Literal["all", "every-2", "last-half"]
"""Layers that get experts: ``every-2`` is 1, 3, 5, ...; ``last-half`` may be one more than half."""

ROUTER_STD = 0.02
"""Standard deviation of new routers (Komatsuzaki et al. 2023)."""


def upcycle(
    source: str | Path,
    target: Path,
    num_experts: int,
    k: int,
    split: int | None = None,
    moe_layers: MoELayers = "all",
    seed: int = 0,
    ignore_unused_weights: bool = False,
    router: UpcycleRouter = "topk",
) -> str:
    """Write ``source`` with experts to ``target`` and return its ``model_type`` there.

    ``split`` None is 1 for ``topk``, and ``num_experts`` for the other routers. Raises
    :class:`ConfigError` for sizes that cannot give the dense model's function. One layer's MLP is
    in memory at a time.
    """
    if split is None:
        split = 1 if router == "topk" else num_experts
    source = local_folder(source)
    folder = ModelFolder(source)
    try:
        left_out = folder.check(ignore_unused_weights=ignore_unused_weights)
        if left_out is not None:
            log.warning("%s", left_out)
        config = _config(folder, num_experts, k, split, moe_layers, router)
        weights = UpcycledWeights(folder, config, split, seed, router)
        return write_changed(source, folder, target, config, weights)
    finally:
        folder.close()


class UpcycledWeights:
    """The weights of a dense folder, its MLPs as experts."""

    def __init__(
        self,
        folder: ModelFolder,
        config: LayersConfig,
        split: int,
        seed: int,
        router: UpcycleRouter,
    ) -> None:
        self._dense = FolderWeights(folder, folder.dtype)
        self._config = config
        self._split = split
        self._seed = seed
        self._router = UPCYCLE_ROUTERS[router]
        self._layer = -1
        self._matrices: dict[str, Tensor] = {}

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor of the decoder outside the experts; routers are drawn by seed."""
        if parameter.endswith(".mlp.gate.step"):
            return torch.zeros((), dtype=torch.int64)
        if not parameter.endswith(".mlp.gate.weight"):
            return self._dense.dense(parameter)
        assert self._config.moe is not None, "only MoE layers have routers"
        rows_per_draw = self._split if self._router.shares_rows else 1
        num_copies = self._config.moe.num_experts // rows_per_draw
        generator = generator_of(f"{self._seed}/{parameter}")
        rows_CD = torch.randn(num_copies, self._config.d_model, generator=generator) * ROUTER_STD
        return rows_CD.repeat_interleave(rows_per_draw, dim=0)

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a slice of a dense matrix: rows of gate and up, columns of down times a factor."""
        if self._layer != layer:
            self._layer, self._matrices = layer, {}
        if part not in self._matrices:
            name = f"layers.{layer}.mlp.{part}_proj.weight"
            self._matrices[part] = self._dense.dense(name)
        dim = 1 if part == "down" else 0
        piece = self._matrices[part].chunk(self._split, dim)[expert % self._split]
        return piece * self._router.down_factor(self._split) if part == "down" else piece


def _config(
    folder: ModelFolder,
    num_experts: int,
    k: int,
    split: int,
    moe_layers: MoELayers,
    router: UpcycleRouter,
) -> LayersConfig:
    dense = folder.config
    check_gated_mlps(dense)
    if dense.moe is not None:
        raise ConfigError(
            f"{folder.path} has {dense.moe.num_experts} experts already; give a dense folder."
        )
    assert dense.d_ff is not None, "the configuration was not validated"
    if split < 1 or dense.d_ff % split:
        raise ConfigError(
            f"split is {split}; use 1 or another divisor of the MLP's width {dense.d_ff}."
        )
    if not split <= num_experts <= MOST_EXPERTS or num_experts % split:
        raise ConfigError(
            f"num_experts is {num_experts}, but a copy of the MLP takes split = {split} experts; "
            f"use a multiple of {split} from {split} to {MOST_EXPERTS}."
        )
    UPCYCLE_ROUTERS[router].check(num_experts, k, split)
    first, step = {"all": (0, 1), "every-2": (1, 2), "last-half": (dense.num_layers // 2, 1)}[
        moe_layers
    ]
    sparse = range(first, dense.num_layers, step)
    if not sparse:
        raise ConfigError(
            f"moe_layers is {moe_layers}, which leaves a model of {dense.num_layers} layer(s) "
            "without experts; use all."
        )
    moe = MoEConfig(
        num_experts=num_experts,
        d_expert=dense.d_ff // split,
        router=UPCYCLE_ROUTERS[router].config(k),
    )
    dense_layers = tuple(layer for layer in range(dense.num_layers) if layer not in sparse)
    return dense.model_copy(update={"moe": moe, "dense_layers": dense_layers})
