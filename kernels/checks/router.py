"""Check a router backend's choices and gradients against torch in fp64. T tokens, E experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_ops.router import choose_torch
from ..values.choice import ChoiceRule, Choices

Choose = Callable[[Tensor, Tensor | None, Tensor | None, ChoiceRule, bool], Choices]
"""Logits, bias, valid rows, rule, and whether the losses need sums."""

LIMIT = 1e-5
"""Largest error that passes, over the largest value of the same tensor."""

T, E = 301, 24
"""More than one block of rows, and lanes that are padding."""

RULES = (
    ChoiceRule(k=3, renormalize=False),
    ChoiceRule(k=3, score="sigmoid", scale=2.5, num_groups=4, top_groups=2),
)
"""Both kinds of scores; the second chooses with a bias, too, and leaves rows out."""


def problem_with(choose: Choose, device: torch.device) -> str | None:
    """Return what is wrong with ``choose`` on this device, or None."""
    generator = torch.Generator().manual_seed(0)
    # Scores further apart than fp32 rounds, so that both make the same choice.
    logits_TE = torch.rand(T, E, generator=generator).argsort(dim=1) * 0.25 - 3
    for rule in RULES:
        bias_E, valid_T = None, None
        if rule.num_groups > 1:
            bias_E, valid_T = torch.linspace(-0.4, 0.4, E), torch.arange(T) % 5 > 0
        expected = _outcome(choose_torch, logits_TE.double(), bias_E, valid_T, rule)
        if bias_E is not None and valid_T is not None:
            bias_E, valid_T = bias_E.to(device), valid_T.to(device)
        try:
            found = _outcome(choose, logits_TE.to(device), bias_E, valid_T, rule)
        except Exception as error:  # any error: warn and use torch's operators
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        for name, reference in expected.items():
            distance = (found[name].double().cpu() - reference.double()).abs().max()
            if not distance <= LIMIT * reference.double().abs().max():
                return f"{name} of {rule.score} scores are off by {float(distance):.0e}"
    return None


def _outcome(
    choose: Choose,
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
) -> dict[str, Tensor]:
    """Return the choices, and the gradient of fixed weighted sums of them."""
    logits_TE = logits_TE.detach().requires_grad_()
    made = choose(logits_TE, bias_E, valid_T, rule, True)
    assert made.sums is not None, "they were asked for"
    outputs = (made.weights_TK, *made.sums)
    slopes = [torch.linspace(-1, 2, max(1, o.numel())).to(o).view_as(o) for o in outputs]
    (grad_TE,) = torch.autograd.grad(outputs, logits_TE, slopes)
    names = ("weights", "probability sums", "z sums")
    values = {name: part.detach() for name, part in zip(names, outputs, strict=True)}
    return {"experts": made.experts_TK, "counts": made.counts_E, **values, "gradients": grad_TE}
