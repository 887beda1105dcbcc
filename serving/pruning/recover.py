"""Prune a model's experts layer by layer, so that each layer does what the exact one did.

Two streams of rows go through the decoder: those of the exact model, and those of the pruned one.
An expert is fitted to what its layer's output lacks: its own output, the errors of the experts
before it, and how far the streams are apart. So errors are made up for and do not add up. The rows
of one layer and the exact weights of one expert are in memory at a time, and all pruned experts.

N rows of the text, T those of a batch, L tokens of a window, B windows, D model width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.values.group_sparse import GroupSparseExpertWeights, GroupSparseView
from ...moe.batch import batch_of_rows
from ...moe.blocks.residual import Residual
from ...moe.experts.quantized import QuantizedExperts
from ...moe.folders.calibration import PASS_TOKENS
from ...moe.folders.folder import ModelFolder
from ...moe.folders.group_sparse_format import GroupSparseFormat
from ...moe.layer import MoELayer
from ...moe.models.decoder import Decoder
from ...progress import Progress
from .layer import ExpertPruner
from .layer_rows import LayerRows, Seen


class Recovered:
    """Experts that are pruned already."""

    def __init__(self, layers: Mapping[int, GroupSparseExpertWeights], num_plain: int) -> None:
        self._layers = layers
        self.num_plain = num_plain
        """See :class:`ExpertPruner`."""

    def pruned(
        self, layer: int, expert: int, part: str, weight_QP: Tensor, kept: int
    ) -> GroupSparseView:
        """See :class:`.Pruner`."""
        view = self._layers[layer].slot_views(expert)[part]
        assert isinstance(view, GroupSparseView), f"{part} is a matrix"
        return view


def recover(
    decoder: Decoder,
    folder: ModelFolder,
    windows_BL: Tensor,
    packed: GroupSparseFormat,
) -> Recovered:
    """Return a model's experts, pruned and fitted on the tokens ``windows_BL``.

    ``folder`` is the model's, whose experts ``decoder`` loses.
    """
    pruner = ExpertPruner(folder, packed)
    per_pass = max(1, PASS_TOKENS // windows_BL.shape[1])
    exact = pruned = LayerRows.of([batch_of_rows(some) for some in windows_BL.split(per_pass)])
    found = {}
    modules = dict(decoder.moe_layers())
    num_experts = sum(module.num_experts for module in modules.values())
    with Progress("pruning experts", num_experts) as progress:
        for layer in range(decoder.config.num_layers):
            mlp = modules.get(layer)
            exact, wanted_TD = exact.outputs(decoder, layer)
            if mlp is not None:
                seen = pruned.seen(decoder, layer, mlp)
                lacking_ND = _lacking(decoder, layer, mlp, seen, wanted_TD)
                found[layer] = pruner.prune(layer, seen, lacking_ND, progress)
                mlp.experts = QuantizedExperts(found[layer])
            pruned = pruned.through(decoder, layer)
    return Recovered(found, pruner.num_plain)


def _lacking(
    decoder: Decoder, layer: int, mlp: MoELayer, seen: Seen, wanted_TD: list[Tensor]
) -> Tensor:
    """Return what exact experts would have to add, on the pruned stream, to reach the exact one.

    Where experts' output is not simply added, or rows of experts are not those of tokens, nothing.
    """
    block = getattr(decoder.layers[layer], "block", None)
    if not isinstance(block, Residual) or mlp.gate.config.varies:
        return torch.zeros(seen.x_ND.shape)
    pairs = zip(wanted_TD, seen.out_TD, strict=True)
    return torch.cat([wanted.float() - out.float() for wanted, out in pairs])
