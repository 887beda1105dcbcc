"""Experts merged into one dense MLP: the way back from upcycling.

With S slices of a copy, experts ``c*S .. c*S + S-1`` are the slices of copy c, as ``upcycle`` lays
them out. Copies are averaged, slices are put side by side, and down projections are multiplied by
the weight that each expert would have if the router took all and liked them equally. So:

1. Slices of one copy whose router runs all of them with constant weights (``stochastic`` in
   evaluation, ``routed_ffn`` with rows of 0 and k = E) merge into the same function (Zhang et al.
   2023, "Split & Merge").
2. A model that was just upcycled merges into the dense model it came from.
3. Others become another function, which training must follow: the average of trained experts is
   not the average of what they compute.

A shared expert without a gate is part of every token's sum, so it stands next to the slices.

E experts, S slices, D model width, F expert width.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config.model import ModelConfig, decoder_config
from ..config.moe import MoEConfig
from ..routers.router import RouterConfig
from ..routers.stochastic import Stochastic
from ..routers.topk import TopK
from .changed import write_changed
from .folder import ModelFolder
from .hub import local_folder
from .write_weights import FolderWeights

log = logging.getLogger(__name__)


def merge(
    source: str | Path,
    target: Path,
    split: int | None = None,
    ignore_unused_weights: bool = False,
) -> str:
    """Write ``source`` without experts to ``target`` and return its ``model_type`` there.

    ``split`` is the number of slices of a copy; None = all experts are slices of one. Raises
    :class:`ConfigError` for a model whose experts do not fit into a dense MLP. One layer's experts
    are in memory at a time.
    """
    source = local_folder(source)
    folder = ModelFolder(source)
    try:
        left_out = folder.check(ignore_unused_weights=ignore_unused_weights)
        if left_out is not None:
            log.warning("%s", left_out)
        moe = folder.config.moe
        if moe is None:
            raise ConfigError(f"{folder.path} has no experts; give a folder that has.")
        if split is None:
            split = moe.num_experts
        config = _config(decoder_config(folder.config), moe, split)
        weights = MergedWeights(folder, moe, split)
        return write_changed(source, folder, target, config, weights)
    finally:
        folder.close()


class MergedWeights:
    """The weights of a folder with experts, whose layers are dense."""

    def __init__(self, folder: ModelFolder, moe: MoEConfig, split: int) -> None:
        self._source = FolderWeights(folder, folder.dtype)
        self._sparse = folder.config
        self._moe = moe
        self._split = split

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor of the decoder; an MLP's is made from experts, in fp64."""
        for layer in self._sparse.moe_layers:
            for part in ("gate", "up", "down"):
                if parameter == f"layers.{layer}.mlp.{part}_proj.weight":
                    return self._merged(layer, part)
        return self._source.dense(parameter)

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """There are no experts."""
        raise AssertionError("a dense folder has no experts")

    def _merged(self, layer: int, part: str) -> Tensor:
        pieces = [self._mean_slice(layer, index, part) for index in range(self._split)]
        if part == "down":
            weight = equal_weight(self._sparse.router(layer), self._moe.num_experts)
            copies = self._moe.num_experts // self._split
            pieces = [piece * (weight * copies) for piece in pieces]
        if self._moe.d_shared:
            name = f"layers.{layer}.mlp.shared_expert.{part}_proj.weight"
            pieces.append(self._source.dense(name).double())
        return torch.cat(pieces, dim=1 if part == "down" else 0)

    def _mean_slice(self, layer: int, index: int, part: str) -> Tensor:
        """Return a slice's mean over the copies."""
        copies = range(index, self._moe.num_experts, self._split)
        found = [self._source.expert_part(layer, expert, part).double() for expert in copies]
        return torch.stack(found).mean(dim=0)


def equal_weight(router: RouterConfig, num_experts: int) -> float:
    """Return the weight of each expert where ``router`` takes all and likes them equally.

    Raises :class:`ConfigError` for routers that have no such weight.
    """
    if isinstance(router, Stochastic):
        return 1 / num_experts
    if isinstance(router, TopK):
        is_free = router.score == "sigmoid" and not router.renormalize
        return router.scale * (0.5 if is_free else 1 / num_experts)
    raise ConfigError(
        f"router.kind is {getattr(router, 'kind', type(router).__name__)}, whose weights are not "
        "those of a sum over all experts; merge takes topk and stochastic."
    )


def _config(sparse: ModelConfig, moe: MoEConfig, split: int) -> ModelConfig:
    if split < 1 or moe.num_experts % split:
        raise ConfigError(
            f"split is {split}, which does not divide the {moe.num_experts} experts; use 1 to "
            f"average all, {moe.num_experts} to join all, or another divisor."
        )
    if moe.activation != "swiglu":
        raise ConfigError(
            f"the experts' activation is {moe.activation}, but dense layers are swiglu; give a "
            "folder of swiglu experts."
        )
    if moe.expert_bias or moe.shared_gate:
        part = "biases" if moe.expert_bias else "a gate on the shared expert"
        raise ConfigError(
            f"the layers have {part}, which a dense MLP has not; give a folder without."
        )
    width = split * moe.d_expert + moe.d_shared
    if sparse.dense_layers and sparse.d_ff != width:
        raise ConfigError(
            f"merged layers would be {width} wide, but the dense ones are {sparse.d_ff}; with "
            f"split = {split} only a folder that was cut from these fits."
        )
    return sparse.model_copy(update={"moe": None, "dense_layers": (), "d_ff": width})
