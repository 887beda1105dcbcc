"""Routers of some layers that are asked ahead. S layers, E experts, D model width, R = S * E."""

from typing import NamedTuple

from torch import Tensor


class NextRouters(NamedTuple):
    """What scores the experts of some layers for a row, and how many are named."""

    weight_RD: Tensor
    """The nearest layer first; fp32 or bf16."""
    bias_SE: Tensor
    """fp32."""
    corrections_SE: Tensor | None
    """Added to sigmoid scores, fp32; None if the logits are the scores."""
    choices: int
    """K: experts that a row visits in a layer."""
    named: int
    """W, from K to E."""
    sharpness: float
    """How fast chances fall from the K-th score on."""
