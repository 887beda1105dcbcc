"""The expert MLP with frozen matrices, which may come in waves, and low-rank updates that train.

The update of a matrix W is ``s B A`` (LoRA, Hu et al. 2021): ``W x + s B (A x)``, never ``B A``
itself. The matrices are in memory, or come from elsewhere some experts at a time, plain or in 8 or
4 bits (as in QLoRA, Dettmers et al. 2023: dequantized when they are used). Backward needs them
again, so they come a second time.

Three things make results independent of the waves:

- Each row has its own lines, which its expert fills once.
- What is not a product with a frozen matrix runs once for all rows, or expert by expert.
- Gradients of A and B are computed once, from all rows of an expert.

T tokens, K choices, R = T*K routed rows, N <= R rows that have an expert, in expert order, n those
of one expert, D model width, F expert width, H rows of fc1, P rank, Q outputs and I inputs of a
matrix.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grouped_linear import grouped_linear, grouped_sums, grouped_transposed
from .torch_ops.frozen_rows import FrozenRows, Wave
from .torch_ops.loop import Span
from .values.activation import fc1_rows, gated, gated_backward
from .values.frozen import FrozenExperts
from .values.low_rank import LowRank, Update, without_blocks


def frozen_expert_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: FrozenExperts,
    low_rank: LowRank | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]`` in x's dtype.

    Like :func:`.experts.expert_mlp`, but differentiable in x, the weights and ``low_rank`` only.
    Forward keeps x and, without ``recompute``, the pre-activations: R * H elements. With it,
    backward computes them again from fc1, with the same bits. The result has a graph if any
    argument requires gradients, even without rows, so that all ranks run the same backward. Raises
    ``ValueError`` for expert ids out of range, and in both passes what ``experts.stream`` raises.
    """
    parts = (None,) * 4 if low_rank is None else low_rank.parts
    scale = 0.0 if low_rank is None else low_rank.scale
    rows = FrozenRows(experts_TK, experts)
    y_TD: Tensor = _FrozenExpertMLP.apply(x_TD, weights_TK, *parts, rows, scale, recompute)
    return y_TD


class _FrozenExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weights_TK, a1, b1, a2, b2, rows, scale, recompute):  # type: ignore[no-untyped-def]
        update = None if a1 is None else LowRank(a1, b1, a2, b2, scale)
        x_ND, d_expert = rows.of(x_TD), rows.experts.d_expert
        d_hidden = fc1_rows(d_expert, rows.experts.activation)
        h_NH, act_NF = x_ND.new_empty(len(x_ND), d_hidden), x_ND.new_empty(len(x_ND), d_expert)
        y_ND = torch.empty_like(x_ND)
        add_NH = None if update is None else _up(update.first(), x_ND, rows.spans)
        for wave in rows.waves(x_TD.dtype):
            _pre_activations(wave, x_ND, add_NH, h_NH)
            for _, start, end in wave.spans:
                act_NF[start:end] = gated(h_NH[start:end], rows.experts.activation)
            grouped_linear(act_NF, wave.fc2_SDF, wave.spans, y_ND)
            for (_, start, end), (_, bias2_D) in zip(wave.spans, wave.biases, strict=True):
                if bias2_D is not None:
                    y_ND[start:end] += bias2_D
        if update is not None:
            y_ND += _up(update.second(), act_NF, rows.spans)
        ctx.rows, ctx.scale = rows, scale
        ctx.save_for_backward(x_TD, weights_TK, None if recompute else h_NH, a1, b1, a2, b2)
        y_TKD = weights_TK.unsqueeze(-1) * rows.by_choice(y_ND)
        return y_TKD.sum(dim=1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weights_TK, h_NH, a1, b1, a2, b2 = ctx.saved_tensors
        rows, wants_x = ctx.rows, ctx.needs_input_grad[0]
        update = None if a1 is None else LowRank(a1, b1, a2, b2, ctx.scale)
        lines = _Backward(rows, x_TD, grad_TD.contiguous(), weights_TK, h_NH, update)
        grad_x_ND = torch.empty_like(lines.x_ND)
        for wave in rows.waves(x_TD.dtype):
            lines.add(wave)
            if wants_x:
                grouped_transposed(lines.grad_h_NH, wave.fc1_SHD, wave.spans, grad_x_ND)
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if update is not None:
            spans, first = rows.spans, update.first()
            scaled_ND = (lines.grad_ND * lines.weights_N1).to(x_TD.dtype)
            grad_a2, grad_b2, _ = _gradients(update.second(), lines.act_NF, scaled_ND, spans)
            grad_a1, blocks_SH2P, low_N2P = _gradients(first, lines.x_ND, lines.grad_h_NH, spans)
            grads = grad_a1, without_blocks(blocks_SH2P, b1.shape[2]), grad_a2, grad_b2
            if wants_x:
                grad_x_ND += grouped_transposed(low_N2P, first.a_SPI, spans)
        grad_x_TD = rows.by_choice(grad_x_ND).sum(dim=1) if wants_x else None
        grad_weights_TK = rows.by_choice(lines.grad_weights_N1).squeeze(-1)
        return grad_x_TD, grad_weights_TK, *grads, None, None, None


class _Backward:
    """Gradients of the rows, expert by expert as their matrices come."""

    def __init__(
        self,
        rows: FrozenRows,
        x_TD: Tensor,
        grad_TD: Tensor,
        weights_TK: Tensor,
        h_NH: Tensor | None,
        update: LowRank | None,
    ) -> None:
        self._activation = rows.experts.activation
        self.x_ND, self.grad_ND = rows.of(x_TD), rows.of(grad_TD)
        self.weights_N1 = rows.of_choices(weights_TK)
        self.grad_weights_N1 = torch.empty_like(self.weights_N1)
        num_rows, d_expert = rows.num_rows, rows.experts.d_expert
        self.act_NF = self.x_ND.new_empty(num_rows, d_expert)
        self.grad_h_NH = self.x_ND.new_empty(num_rows, fc1_rows(d_expert, self._activation))
        self._grad_act_NF = torch.empty_like(self.act_NF)
        self._is_kept = h_NH is not None
        self._h_NH = torch.empty_like(self.grad_h_NH) if h_NH is None else h_NH
        self._add_NH = self._add_NF = None
        if update is not None:
            self._add_NF = _down(update.second(), self.grad_ND, rows.spans)
            if not self._is_kept:
                self._add_NH = _up(update.first(), self.x_ND, rows.spans)

    def add(self, wave: Wave) -> None:
        """Compute activations and gradients of a wave's rows."""
        if not self._is_kept:
            _pre_activations(wave, self.x_ND, self._add_NH, self._h_NH)
        grouped_transposed(self.grad_ND, wave.fc2_SDF, wave.spans, self._grad_act_NF)
        for (_, start, end), (_, bias2_D) in zip(wave.spans, wave.biases, strict=True):
            n, wide = slice(start, end), self.weights_N1.dtype
            unscaled_nF = self._grad_act_NF[n]
            if self._add_NF is not None:
                unscaled_nF += self._add_NF[n]
            scaled_nF = (unscaled_nF * self.weights_N1[n]).to(unscaled_nF.dtype)
            act_nF, grad_h_nH = gated_backward(self._h_NH[n], scaled_nF, self._activation)
            self.act_NF[n], self.grad_h_NH[n] = act_nF, grad_h_nH
            # <dy_t, y_row> = <W2^T dy_t, act> + <dy_t, b2>, so the outputs need not be kept.
            dots_n1 = (unscaled_nF * act_nF).sum(dim=-1, keepdim=True, dtype=wide)
            if bias2_D is not None:
                dots_n1 += (self.grad_ND[n] * bias2_D).sum(dim=-1, keepdim=True, dtype=wide)
            self.grad_weights_N1[n] = dots_n1


def _pre_activations(wave: Wave, x_ND: Tensor, add_NH: Tensor | None, h_NH: Tensor) -> None:
    """Fill the wave's rows of ``h_NH``; ``add_NH`` is what the update adds."""
    grouped_linear(x_ND, wave.fc1_SHD, wave.spans, h_NH)
    for (_, start, end), (bias1_H, _) in zip(wave.spans, wave.biases, strict=True):
        if bias1_H is not None:
            h_NH[start:end] += bias1_H
        if add_NH is not None:
            h_NH[start:end] += add_NH[start:end]


def _up(update: Update, x_NI: Tensor, spans: list[Span]) -> Tensor:
    """Return ``s B A x``, ``[N, Q]``: one product for all A and one for all B."""
    low_NP = grouped_linear(x_NI, update.a_SPI, spans)
    return grouped_linear(low_NP, update.b_SQP, spans).mul_(update.scale)


def _down(update: Update, grad_NQ: Tensor, spans: list[Span]) -> Tensor:
    """Return ``s A^T B^T grad``, ``[N, I]``."""
    low_NP = grouped_transposed(grad_NQ, update.b_SQP, spans)
    return grouped_transposed(low_NP, update.a_SPI, spans).mul_(update.scale)


def _gradients(
    update: Update, x_NI: Tensor, grad_NQ: Tensor, spans: list[Span]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of A, of B and of ``A x``, for that of the product, ``grad_NQ``."""
    scaled_NQ, num_slots = grad_NQ * update.scale, len(update.a_SPI)
    low_NP = grouped_linear(x_NI, update.a_SPI, spans)
    grad_low_NP = grouped_transposed(scaled_NQ, update.b_SQP, spans)
    grad_a_SPI = grouped_sums(grad_low_NP, x_NI, num_slots, spans)
    return grad_a_SPI, grouped_sums(scaled_NQ, low_NP, num_slots, spans), grad_low_NP
