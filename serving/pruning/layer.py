"""Prune the experts of one layer.

N rows of the text, n those of an expert, D model width, F expert width, H rows of fc1, K choices,
E experts.
"""

import torch
from torch import Tensor

from ...kernels.values.group_sparse import GroupSparseExpertWeights
from ...moe.config.moe import MoEConfig
from ...moe.folders.calibration import FEW_ROWS
from ...moe.folders.folder import ModelFolder
from ...moe.folders.group_sparse_format import GroupSparseFormat
from ...moe.folders.write_weights import FolderWeights
from ...progress import Progress
from .expert import Expert, ExpertRows, Views, fit_expert, prune_plainly, pruned_output
from .layer_rows import Seen


class ExpertPruner:
    """Prunes the experts of a model, a layer at a time."""

    def __init__(self, folder: ModelFolder, packed: GroupSparseFormat) -> None:
        moe = folder.config.moe
        assert moe is not None, "choose_sparsity refuses models without experts"
        self._moe: MoEConfig = moe
        self._d_model = folder.config.d_model
        self._packed = packed
        self._weights = FolderWeights(folder, torch.float32)
        self.num_plain = 0
        """Experts that had fewer rows than inputs. They are pruned by importance alone."""

    def prune(
        self, layer: int, seen: Seen, lacking_ND: Tensor, progress: Progress
    ) -> GroupSparseExpertWeights:
        """Return the pruned experts of a layer.

        ``lacking_ND`` is what its output lacks with exact experts; then, with pruned ones.
        """
        moe, parts = self._moe, self._moe.fc1_parts
        fc1 = self._packed.empty(moe.num_experts, len(parts) * moe.d_expert, self._d_model)
        fc2 = self._packed.empty(moe.num_experts, self._d_model, moe.d_expert)
        biases = None
        if moe.expert_bias:
            names = ((*parts,), ("down",))
            biases = [
                torch.stack([self._joined(layer, e, name, "_bias") for e in range(moe.num_experts)])
                for name in names
            ]
        found = GroupSparseExpertWeights(
            fc1,
            fc2,
            activation=moe.activation,
            fc1_bias_SH=None if biases is None else biases[0],
            fc2_bias_SD=None if biases is None else biases[1],
        )
        for number in range(moe.num_experts):
            views = self._prune_expert(layer, number, seen, lacking_ND)
            for matrix, view in zip((fc1, fc2), views, strict=True):
                slot = matrix.view(number, 0, matrix.values.shape[1])
                for part, values in zip(slot, view, strict=True):
                    part.copy_(values)
            progress.advance()
        return found

    def _prune_expert(self, layer: int, number: int, seen: Seen, lacking_ND: Tensor) -> Views:
        parts = self._moe.fc1_parts
        expert = Expert(
            self._joined(layer, number, parts),
            self._joined(layer, number, ("down",)),
            self._joined(layer, number, parts, "_bias") if self._moe.expert_bias else None,
            self._moe.activation,
        )
        kept = (
            self._packed.kept("fc1", expert.fc1_HD.shape[1]),
            self._packed.kept("fc2", expert.fc2_DF.shape[1]),
        )
        is_chosen_NK = seen.experts_NK == number
        rows_n = is_chosen_NK.any(dim=1).nonzero().flatten()
        share_N = (seen.weights_NK.float() * is_chosen_NK).sum(dim=1)
        x_nD, share_n1 = seen.x_ND[rows_n].float(), share_N[rows_n].unsqueeze(1)
        exact_nD = (expert.hidden(x_nD) * share_n1) @ expert.fc2_DF.T
        rows = ExpertRows(x_nD, share_n1, exact_nD + lacking_ND[rows_n])
        if len(rows_n) < max(expert.fc1_HD.shape[1], expert.fc2_DF.shape[1]):
            self.num_plain += 1
            # Few rows of the expert say less about it than as many of the whole layer.
            plain_nD = x_nD if len(x_nD) >= FEW_ROWS else _some(seen.x_ND)
            views = prune_plainly(expert, plain_nD, kept)
        else:
            views = fit_expert(expert, rows, kept)
        lacking_ND[rows_n] = rows.wanted_nD - pruned_output(expert, rows, views)
        return views

    def _joined(self, layer: int, expert: int, parts: tuple[str, ...], suffix: str = "") -> Tensor:
        names = [f"{part}{suffix}" for part in parts]
        return torch.cat([self._weights.expert_part(layer, expert, name) for name in names])


def _some(x_ND: Tensor) -> Tensor:
    """Return rows from all over the text."""
    return x_ND[:: max(1, len(x_ND) // FEW_ROWS)][:FEW_ROWS].float()
