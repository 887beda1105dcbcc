"""What the inputs of experts look like on a calibration text.

N rows, D model width, F expert width, K choices, E experts, B windows of L tokens.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import DataError
from ...kernels.values.activation import gated
from ...kernels.values.group_sparse import GroupSparseView
from ...kernels.values.sparsify import sparsify
from ...progress import Progress
from ..config.moe import MoEConfig
from ..models.language_model import LanguageModel
from .folder import ModelFolder
from .write_weights import FolderWeights

FEWEST_TOKENS = 1024
"""With less, most experts of most models would see next to no rows."""
MOST_TOKENS = 65536
"""What is read of a longer text: more changes little and takes time."""
MOST_CHARACTERS = 8 * MOST_TOKENS
FEW_ROWS = 64
"""Experts that saw fewer rows are judged by rows of the whole layer: the mean square of 64 values
is off by 18 % (a standard deviation, for a normal distribution)."""
PASS_TOKENS = 4096
"""Tokens of a forward pass, unless one window is longer: experts are read once for each."""


class _LayerSums:
    """Sums of squares of one layer, in fp64."""

    def __init__(self, moe: MoEConfig, d_model: int) -> None:
        shape = {"dtype": torch.float64, "device": "cpu"}
        self.rows_E = [0] * moe.num_experts
        self.inputs_ED = torch.zeros(moe.num_experts, d_model, **shape)  # type: ignore[call-overload]
        self.hidden_EF = torch.zeros(moe.num_experts, moe.d_expert, **shape)  # type: ignore[call-overload]
        self.some_rows_ND: Tensor | None = None


class Calibration:
    """Mean squares of the inputs of every expert's matrices."""

    def __init__(self, folder: ModelFolder) -> None:
        moe = folder.config.moe
        assert moe is not None, "only experts are calibrated"
        self._moe: MoEConfig = moe
        self._weights = FolderWeights(folder, torch.float32)
        self._layers = {
            layer: _LayerSums(moe, folder.config.d_model) for layer in folder.config.moe_layers
        }

    def add(self, layer: int, x_ND: Tensor, experts_NK: Tensor) -> None:
        """Take the rows that a layer's experts are given, and which experts each row chose."""
        sums, x_ND = self._layers[layer], x_ND.float()
        if sums.some_rows_ND is None:
            sums.some_rows_ND = x_ND[:: max(1, len(x_ND) // FEW_ROWS)][:FEW_ROWS].clone()
        for expert in range(self._moe.num_experts):
            rows_N = (experts_NK == expert).any(dim=1)
            if rows_N.any():
                x_nD = x_ND[rows_N]
                sums.rows_E[expert] += len(x_nD)
                sums.inputs_ED[expert] += x_nD.square().sum(dim=0, dtype=torch.float64)
                sums.hidden_EF[expert] += self._hidden_squares(layer, expert, x_nD)

    def finish(self) -> None:
        """Give experts with few rows the statistics of the layer: those of a sample of its rows."""
        for layer, sums in self._layers.items():
            assert sums.some_rows_ND is not None, "no rows came"
            total_D = sums.inputs_ED.sum(dim=0) / max(1, sum(sums.rows_E))
            for expert, rows in enumerate(sums.rows_E):
                if rows < FEW_ROWS:
                    hidden_F = self._hidden_squares(layer, expert, sums.some_rows_ND)
                    sums.inputs_ED[expert] = total_D
                    sums.hidden_EF[expert] = hidden_F / len(sums.some_rows_ND)
                else:
                    sums.inputs_ED[expert] /= rows
                    sums.hidden_EF[expert] /= rows

    def importance(self, layer: int, expert: int, part: str) -> Tensor:
        """Return the mean square of each input of gate or up ``[D]``, or of down ``[F]``."""
        sums = self._layers[layer]
        return (sums.hidden_EF if part == "down" else sums.inputs_ED)[expert]

    def pruned(
        self, layer: int, expert: int, part: str, weight_QP: Tensor, kept: int
    ) -> GroupSparseView:
        """See :class:`.Pruner`: the least important groups go, and the others stay as they are."""
        return sparsify(weight_QP, self.importance(layer, expert, part), kept)

    def few_rows(self) -> int:
        """Return how many experts, of all layers, are judged by their layer's rows."""
        return sum(rows < FEW_ROWS for sums in self._layers.values() for rows in sums.rows_E)

    def _hidden_squares(self, layer: int, expert: int, x_nD: Tensor) -> Tensor:
        """Return the sums of squares of an expert's activations, ``[F]``."""
        names = self._moe.fc1_parts
        parts = [self._weights.expert_part(layer, expert, part) for part in names]
        hidden_nH = F.linear(x_nD, torch.cat(parts))
        if self._moe.expert_bias:
            biases = [self._weights.expert_part(layer, expert, f"{part}_bias") for part in names]
            hidden_nH += torch.cat(biases)
        return gated(hidden_nH, self._moe.activation).square().sum(dim=0, dtype=torch.float64)


def windows_of(model: LanguageModel, text_file: Path) -> Tensor:
    """Return the tokens of a calibration text, ``[B, L]``, in windows as long as the model reads.

    Raises :class:`DataError` for a text that cannot be read or is too short.
    """
    ids_T = _ids(model, text_file)
    length = min(model.config.max_positions, PASS_TOKENS, len(ids_T))
    return ids_T[: len(ids_T) // length * length].view(-1, length)


def calibrate(model: LanguageModel, folder: ModelFolder, text_file: Path) -> Calibration:
    """Run a model on a text and return what its experts' inputs look like.

    ``folder`` is the model's. Raises :class:`DataError` as :func:`windows_of` does.
    """
    windows_BL = windows_of(model, text_file)
    length = windows_BL.shape[1]
    found = Calibration(folder)
    watched = [
        layer.experts.register_forward_pre_hook(partial(_see, found, index))
        for index, layer in model.decoder.moe_layers()
    ]
    try:
        with torch.inference_mode(), Progress("calibrating", windows_BL.numel()) as progress:
            for some_BL in windows_BL.split(max(1, PASS_TOKENS // length)):
                model(some_BL)
                progress.advance(some_BL.numel())
            found.finish()
    finally:
        for handle in watched:
            handle.remove()
    return found


def _see(found: Calibration, layer: int, _: nn.Module, arguments: tuple[Any, ...]) -> None:
    x_ND, experts_NK, *_others = arguments
    found.add(layer, x_ND, experts_NK)


def _ids(model: LanguageModel, text_file: Path) -> Tensor:
    try:
        with text_file.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(
            f"calibration {text_file} cannot be read ({reason}); give a text file."
        ) from None
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < FEWEST_TOKENS:
        raise DataError(
            f"calibration {text_file} has {len(ids)} tokens; give a text of at least "
            f"{FEWEST_TOKENS}."
        )
    return torch.tensor(ids[:MOST_TOKENS])
