"""The weights of a training checkpoint, as an export reads them: tensor by tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelFileError
from ...kernels.values.n_of_m import NOfM, keep_mask, masked
from ...moe.folders.folder import ModelFolder
from ...moe.folders.tensor_names import is_router
from ...moe.folders.write_weights import FolderWeights
from ...moe.models.lora import merged
from .start_from import weights_identity


class CheckpointWeights:
    """The weights of a checkpoint, with low-rank updates merged into theirs.

    ``scale`` is the factor on low-rank updates, None where the run has none. Frozen weights that
    the checkpoint lacks come from ``frozen``, one expert at a time. ``fc1_parts`` are what the rows
    of an expert's fc1 are (:attr:`MoEConfig.fc1_parts`). With a ``pattern`` the matrices of routed
    experts have zeros for the weights that were not in forward.
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor],
        scale: float | None = None,
        frozen: "FrozenWeights | None" = None,
        fc1_parts: Sequence[str] = ("gate", "up"),
        pattern: NOfM | None = None,
    ) -> None:
        self._stored = stored
        self._scale = scale
        self._frozen = frozen
        self._fc1_parts = list(fc1_parts)
        self._pattern = pattern
        self._last: tuple[str, list[Tensor]] | None = None

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor of the decoder outside the experts."""
        kind = "weight" if f"weight/{parameter}" in self._stored else "buffer"
        owner, _, leaf = parameter.rpartition(".")
        key = f"{kind}/{parameter}"
        if self._frozen is not None and key not in self._stored:
            weight = self._frozen.dense(parameter)
        else:
            weight = self._stored[key]
        updates = self._updates(f"{owner}.lora") if leaf == "weight" else []
        return self._merged([weight, *updates])

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a part of an expert; fc1 is read once for both gate and up."""
        matrix, _, bias = part.partition("_")
        leaf = "fc2" if matrix == "down" else "fc1"
        name = f"layers.{layer}.mlp.experts.{expert}.{leaf}{'_bias' if bias else ''}"
        is_stored = self._frozen is None or f"weight/{name}" in self._stored
        if self._last is None or self._last[0] != name:
            weights = [self._in_forward(f"weight/{name}", bias)] if is_stored else []
            self._last = (name, weights + ([] if bias else self._updates(f"{name}_lora")))
        tensors = self._last[1]
        if leaf == "fc1":  # A and B have as many parts
            count, index = len(self._fc1_parts), self._fc1_parts.index(matrix)
            tensors = [tensor.chunk(count)[index] for tensor in tensors]
        if self._frozen is not None and not is_stored:
            tensors = [self._frozen.expert_part(layer, expert, part), *tensors]
        return self._merged(tensors)

    def _in_forward(self, key: str, is_bias: str) -> Tensor:
        """Return an expert's tensor as forward saw it."""
        stored = self._stored[key]
        if self._pattern is None or is_bias:
            return stored
        return masked(stored, keep_mask(stored, self._pattern))

    def _updates(self, prefix: str) -> list[Tensor]:
        """Return A and B of a low-rank update, if there is one."""
        if f"weight/{prefix}_a" not in self._stored:
            return []
        return [self._stored[f"weight/{prefix}_{matrix}"] for matrix in "ab"]

    def _merged(self, tensors: list[Tensor]) -> Tensor:
        if self._scale is None or len(tensors) == 1:
            return tensors[0]
        weight, a, b = tensors
        return merged(weight, a, b, self._scale)


class FrozenWeights:
    """What a run with ``train.expert_memory`` left in its folder, in the type it trained with."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype) -> None:
        self._weights, self._dtype = FolderWeights(folder, dtype), dtype

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor outside the experts; routers and integers keep their type."""
        tensor = self._weights.dense(parameter)
        keeps_type = is_router(parameter) or not tensor.is_floating_point()
        return tensor if keeps_type else tensor.to(self._dtype)

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a part of an expert."""
        return self._weights.expert_part(layer, expert, part)


def open_frozen_weights(state: Mapping[str, Any], dtype: torch.dtype) -> FrozenWeights | None:
    """Open the folder that has a checkpoint's frozen weights; None if the checkpoint has them.

    Raises :class:`CheckpointError` if the folder is gone or has other weights.
    """
    wanted = state.get("frozen")
    if wanted is None:
        return None
    path = Path(state["origin"]["folder"])
    try:
        folder = ModelFolder(path)
    except ModelFileError as error:
        raise CheckpointError(
            f"the checkpoint has no frozen weights, and {path}, where they are, cannot be used: "
            f"{error}"
        ) from None
    if weights_identity(path) != wanted:
        raise CheckpointError(
            f"{path} has other weights than when it was trained with; put those back."
        )
    return FrozenWeights(folder, dtype)
