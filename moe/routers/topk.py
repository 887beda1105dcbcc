"""The learned top-k router: softmax or sigmoid scores, expert groups, a balancing bias.

T tokens, D model width, E experts, K choices, G groups of experts, B sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import row_stable_linear
from ...kernels.router import choose, project_and_choose
from ...kernels.values.choice import ChoiceRule, probabilities, scores, where_valid
from .config import TopK
from .router import Router
from .routing import Lookahead, RouterInput, Routing, count_tokens
from .token_rounding import round_tokens


class TopKRouter(Router):
    """See :class:`TopK`. Scores are computed in fp32 (fp64 for fp64 input) whatever x's type."""

    e_score_correction_bias: Tensor | None
    """``[E]``: DeepSeek's name for the balancing bias."""

    def __init__(self, config: TopK, d_model: int, num_experts: int) -> None:
        super().__init__(config.k, num_experts)
        self.config: TopK = config
        self.lookahead = Lookahead(config.lookahead)
        self.rule = ChoiceRule(
            k=config.k,
            score=config.score,
            renormalize=config.renormalize,
            scale=config.scale,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            group_best=2 if config.group_score == "top2" else 1,
        )
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.logit_bias else None
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)
        has_bias = config.bias_update_rate is not None
        bias_E = torch.zeros(num_experts) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k best experts of each row of ``x_TD``.

        What only losses need is left out in evaluation mode.
        """
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must hand over hidden rows"
        if not self.training and valid_T is None:
            routing = self._route_in_cpp(x_TD)
            if routing is not None:
                return routing
        logits_TE = self._logits(x_TD)
        bias_E = self.e_score_correction_bias
        choices = choose(logits_TE, bias_E, valid_T, self.rule, wants_sums=self.training)
        routing = Routing(
            experts_TK=choices.experts_TK,
            weights_TK=choices.weights_TK,
            counts_E=choices.counts_E,
            num_tokens=count_tokens(valid_T, choices.experts_TK),
        )
        if choices.sums is not None:
            routing.probability_sums_E, routing.z_sum = choices.sums
        if self.training and self.config.sequence_balance_loss:
            self._add_sequence_balance(routing, logits_TE, router_input)
        if self.training and self.config.round_rows_to:
            routing.experts_TK, routing.weights_TK = round_tokens(
                routing.experts_TK,
                routing.weights_TK,
                scores(logits_TE, self.rule),
                self.config.round_rows_to,
            )
        return routing

    def _route_in_cpp(self, x_TD: Tensor) -> Routing | None:
        bias_E = self.e_score_correction_bias
        found = project_and_choose(x_TD, self.weight, self.bias, bias_E, self.rule)
        if found is None:
            return None
        return Routing(*found[:3], num_tokens=torch.tensor(x_TD.shape[0]))

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Move the bias towards even load; ``counts_E`` are rows of the whole global batch.

        ``b += rate * sign(mean - load)`` (Wang et al. 2024, algorithm 1). Does nothing without a
        bias.
        """
        bias_E, rate = self.e_score_correction_bias, self.config.bias_update_rate
        if bias_E is not None and rate:
            load_E = counts_E.to(bias_E)
            bias_E += rate * (load_E.mean() - load_E).sign()

    def _logits(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(dtype)
        if self.config.jitter and self.training:
            x_TD = x_TD * (1 + self.config.jitter * (2 * torch.rand_like(x_TD) - 1))
        with torch.autocast(x_TD.device.type, enabled=False):  # it would choose in bf16
            if torch.is_grad_enabled() or dtype != torch.float32:
                logits = F.linear(x_TD, self.weight.to(dtype))
            else:
                logits = row_stable_linear(x_TD, self.weight.to(dtype))
        return logits if self.bias is None else logits + self.bias.to(dtype)

    def _add_sequence_balance(
        self, routing: Routing, logits_TE: Tensor, router_input: RouterInput
    ) -> None:
        valid_T = router_input.valid_T
        scores_TE = probabilities(scores(logits_TE, self.rule), valid_T, self.rule)
        # DeepSeek-V3 eq. 18 counts the best plain scores, whatever bias and groups choose: a
        # bias that evens the load must not hide the sequence's own imbalance.
        best_TK = where_valid(valid_T, scores_TE.topk(self.k, dim=-1).indices)
        lengths = router_input.lengths or (len(scores_TE),)
        routing.sequence_balance_sum, routing.num_sequences = _sequence_balance(
            scores_TE, best_TK, lengths
        )


def _sequence_balance(
    probabilities_TE: Tensor, best_TK: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the sum over sequences of their balance loss, and how many have valid rows.

    Per sequence of n valid tokens: ``E / (K n^2) * sum_e n_e P_e`` (DeepSeek-V3 eq. 17-20; f_e and
    P_e there are n_e E / (K n) and P_e / n). n_e counts ``best_TK``, -1 where a row is not valid.
    """
    num_experts, k = probabilities_TE.shape[1], best_TK.shape[1]
    device = best_TK.device
    sequence_T = torch.arange(len(lengths), device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=len(best_TK)
    )
    present_TK = best_TK >= 0
    cells_TK = sequence_T.unsqueeze(-1) * num_experts + best_TK.clamp(min=0)
    counts_BE = torch.zeros(len(lengths) * num_experts, dtype=torch.int64, device=device)
    counts_BE.scatter_add_(0, cells_TK.flatten(), present_TK.flatten().long())
    counts_BE = counts_BE.view(len(lengths), num_experts)
    valid_B = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    valid_B.scatter_add_(0, sequence_T, present_TK.any(dim=-1).long())
    sums_BE = probabilities_TE.new_zeros(counts_BE.shape).index_add(0, sequence_T, probabilities_TE)
    scale_B = num_experts / (k * valid_B.clamp(min=1).to(sums_BE.dtype).square())
    return ((counts_BE * sums_BE).sum(dim=-1) * scale_B).sum(), (valid_B > 0).sum()
