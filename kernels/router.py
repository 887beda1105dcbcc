"""From logits to choices: one call, on Triton or on torch. T tokens, E experts."""

from typing import Literal

from torch import Tensor

from .gpu.door import choose_triton, is_router_chosen
from .torch_ops.router import ChoiceRule, Choices, choose_torch


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Choices:
    """Return the k best experts of each row, equal scores to the lower id where kernels choose.

    ``bias_E`` is added to the scores to choose by, not to the weights. Rows where ``valid_T`` is
    False get no expert and are not counted. ``wants_sums`` asks for what losses need. ``auto`` is
    Triton on a GPU where its kernels pass their self-check. The projection that makes the logits
    is left to torch: it is a plain product with two more in its backward, and a library's products
    are hard to beat. Raises ``ValueError`` where Triton is asked for in vain.
    """
    arguments = (logits_TE, bias_E, valid_T, rule, wants_sums)
    if backend == "triton" or (backend == "auto" and is_router_chosen(logits_TE)):
        return choose_triton(*arguments)
    return choose_torch(*arguments)
