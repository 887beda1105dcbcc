"""From rows or logits to choices: C++, Triton or torch. T tokens, D model width, E experts."""

from typing import Literal

from torch import Tensor

from .cpu.router import route as route_in_cpp
from .gpu.choice import choose_triton
from .torch_ops.router import choose_torch, weigh_torch
from .trust import may_use_cpp, trusts_triton_router
from .values.choice import ChoiceRule, Choices


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Choices:
    """Return the k best experts of each row. In our kernels, ties go to the lower id.

    ``bias_E`` is added to the scores to choose by, not to the weights. Rows where ``valid_T`` is
    False get no expert and are not counted. ``wants_sums`` asks for what losses need. ``auto`` is
    Triton on a GPU if its kernels pass their self-check. torch
    computes the projection to logits: it is a plain product, with two more in its backward, and a
    library's products are hard to beat. Raises ``ValueError`` if Triton is asked for but cannot
    run.
    """
    arguments = (logits_TE, bias_E, valid_T, rule, wants_sums)
    if backend == "triton" or (backend == "auto" and trusts_triton_router(logits_TE)):
        return choose_triton(*arguments)
    return choose_torch(*arguments)


def weigh(
    logits_TE: Tensor,
    experts_TK: Tensor,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
) -> Choices:
    """Return given experts (-1 = none) with the weights that the rule gives them, on torch alone.

    Where :func:`choose` takes torch, the same experts have the same bits. Raises ``ValueError`` for
    ids that do not exist.
    """
    return weigh_torch(logits_TE, experts_TK, valid_T, rule, wants_sums)


def project_and_choose(
    x_TD: Tensor,
    weight_ED: Tensor,
    logit_bias_E: Tensor | None,
    bias_E: Tensor | None,
    rule: ChoiceRule,
    given_TK: Tensor | None = None,
) -> Choices | None:
    """Do the projection and the choice in one C++ call, or return None if it cannot run.

    For inference: all rows are valid, no gradients, no sums for losses. The logits are
    ``x @ weight.T + logit_bias`` in fp32. ``given_TK`` (-1 = none) are experts to weigh instead of
    choosing; ids that do not exist raise ``ValueError``.
    """
    if not may_use_cpp(x_TD):
        return None
    return route_in_cpp(x_TD, weight_ED, logit_bias_E, bias_E, rule, given_TK)
