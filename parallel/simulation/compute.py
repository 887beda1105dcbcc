"""Seconds of what one rank computes in a micro-batch: products, and work that moves memory.

Products take their operations over the rate they reach. Everything else (norms, activations, sums)
takes the bytes that it reads and writes over the memory bandwidth it reaches.

T tokens, D model width, F expert width, Q and G query and key heads, V vocabulary.
"""

from dataclasses import dataclass

from ..planning.cost_model import Linear
from . import flops
from .cluster import Cluster
from .curve import Curve
from .sizes import Sizes
from .workload import Fold, Workload

EXPERT_ROW = (4, 3)
"""Values that an expert's row moves: D gathered and combined (read and written), and F of the
activation (two read, one written)."""
PATH_COPY = 9
"""Values of D that a copy of a row moves on its way: picked, packed, unpacked (read and written)
and added up (two read, one written)."""
LOGIT_BYTES = 20
"""Bytes in fp32 for each score: converted, exponentiated, normalised, read for the loss."""
UPDATE = 28
"""AdamW reads gradient, weight and two moments and writes three of them, in fp32."""
GRADIENT = 12
"""The norm reads a main gradient and clipping reads and writes it."""


@dataclass(frozen=True, slots=True)
class Compute:
    """The times of one rank."""

    work: Workload
    cluster: Cluster
    fold: Fold

    def products_s(self, operations: float, rows: float, share: float | Curve | None) -> float:
        """Return the seconds of products."""
        return operations / self.cluster.gpu.rate(self.work.precision, share, rows)

    def moved_s(self, num_bytes: float) -> float:
        """Return the seconds of reading and writing."""
        gpu = self.cluster.gpu
        return num_bytes / (gpu.memory_bandwidth * gpu.memory_achieved)

    def streamed_s(self, num_bytes: float) -> float:
        """Return the seconds of reading and writing long arrays: gradients, weights, moments."""
        gpu = self.cluster.gpu
        share = gpu.memory_achieved_update or gpu.memory_achieved
        return num_bytes / (gpu.memory_bandwidth * share)

    def attention_s(self, layer: int) -> tuple[float, float]:
        """Return forward and backward of a layer's attention, with its norm and residual."""
        model, tokens, gpu = self.work.model, self.fold.tokens, self.cluster.gpu
        products = self.products_s(flops.projections(model, tokens), tokens, None)
        core = flops.attention(model, layer, tokens, self.work.sequence_length)
        core_s = self.products_s(core, tokens, _or(gpu.achieved_attention, gpu.achieved))
        q, k, v, out = flops.widths(model)
        has_norm = model.attention.qk_norm is not None and model.attention.latent is None
        values = 5 * model.d_model + (4 if has_norm else 2) * (q + k) + q + k + v + out
        moved = self.moved_s(tokens * values * self.work.item_bytes)
        forward = products + core_s + moved
        return forward, 2 * (products + moved) + flops.ATTENTION_BACKWARD * core_s

    def mlp_s(self, inner: int) -> float:
        """Return forward of a dense MLP or of a shared expert; backward takes twice that."""
        model, tokens = self.work.model, self.fold.tokens
        products = self.products_s(flops.gated_mlp(model, inner, tokens), tokens, None)
        return products + self.moved_s(7 * tokens * inner * self.work.item_bytes)

    def block_s(self) -> float:
        """Return forward of the norm and the residual around an MLP or experts."""
        return self.moved_s(5 * self.fold.tokens * self.work.model.d_model * self.work.item_bytes)

    def router_s(self) -> float:
        """Return forward of a router, in fp32."""
        model, tokens = self.work.model, self.fold.tokens
        assert model.moe is not None, "a layer without experts"
        products = self.products_s(flops.router(model, tokens), tokens, None)
        return products + self.moved_s(4 * tokens * (model.d_model + 3 * model.moe.num_experts))

    def path_s(self, copies: float) -> float:
        """Return the time of packing and adding up ``copies`` of rows, one direction of a layer."""
        values = PATH_COPY * copies * self.work.model.d_model
        return self.moved_s(values * self.work.item_bytes)

    def expert_lines(self, rows: float) -> tuple[Linear, Linear]:
        """Return forward and backward of the experts here, by routed rows.

        A call takes the longer of its products and of reading the weights of all experts here;
        backward reads them twice and adds to the main gradients. The line is exact for ``rows``.
        """
        work, moe = self.work, self.work.model.moe
        assert moe is not None, "a layer without experts"
        here, gpu = moe.num_experts // work.ep, self.cluster.gpu
        share = _or(gpu.achieved_experts, gpu.achieved)
        inner = moe.d_expert / work.expert_tp
        operations = flops.gated_mlp(work.model, moe.d_expert, 1, moe.matrices)
        operations /= work.expert_tp
        product_s = self.products_s(operations, max(1.0, rows / here), share)
        of_model, of_inner = EXPERT_ROW
        moved_s = self.moved_s((of_model * work.model.d_model + of_inner * inner) * work.item_bytes)
        weights = here * Sizes.of(work.model).expert / work.expert_tp
        read_s = self.streamed_s(weights * work.item_bytes)
        write_s = self.streamed_s(weights * 2 * work.wide_bytes)
        of_fc1 = len(moe.fc1_parts) / moe.matrices
        again = of_fc1 if work.recompute == "experts" else 0.0
        forward_s, backward_s = product_s, (flops.BACKWARD + again) * product_s
        return (
            Linear(max(0.0, read_s - rows * forward_s), forward_s + moved_s),
            Linear(max(0.0, 2 * read_s + write_s - rows * backward_s), backward_s + 2 * moved_s),
        )

    def head_s(self) -> tuple[float, float]:
        """Return forward and backward of embedding, last norm, scores and cross-entropy."""
        model, tokens, size = self.work.model, self.fold.tokens, self.work.item_bytes
        products = self.products_s(flops.head(model, tokens), tokens, None)
        scores = self.moved_s(tokens * model.vocabulary * (2 * size + LOGIT_BYTES))
        rows = self.moved_s(4 * tokens * model.d_model * size)
        # The embedding's gradient is as large as the embedding: zeros, and then some rows.
        table = self.moved_s(model.vocabulary * model.d_model * size)
        return products + scores + rows, 2 * products + scores + 2 * rows + table

    def accumulate_s(self, dense_here: float) -> float:
        """Return the time of adding a micro-batch's dense gradients to the main gradients."""
        return self.streamed_s(dense_here * (self.work.item_bytes + 2 * self.work.wide_bytes))

    def update_s(self, dense_here: float, experts_here: float) -> tuple[float, float]:
        """Return the time of norm and clipping, and that of forgetting gradients and of AdamW."""
        wide, size = self.work.wide_bytes / 4, self.work.item_bytes
        all_here = dense_here + experts_here
        narrow = all_here * (4 + size) if size < 4 else 0.0
        update = UPDATE * wide * all_here + 4 * wide * dense_here + narrow
        clip = 8 * wide * all_here
        return self.streamed_s(4 * wide * all_here), self.streamed_s(clip + update)


def _or(share: float | Curve | None, otherwise: float | Curve) -> float | Curve:
    return otherwise if share is None else share
