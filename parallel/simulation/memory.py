"""Bytes of a rank at the peak of a step, predicted (docs/simulate.md has the formulas).

T tokens of a rank's micro-batch, D model width, F expert width, V vocabulary, S experts here.
"""

from dataclasses import dataclass, fields

from . import flops
from .gradients import BUCKET_BYTES
from .sizes import Sizes
from .workload import Fold, Workload

BLOCK, LENGTHS = 64, range(64, 2049)
"""Of the attention on a CPU."""
MOMENTS = 2
"""AdamW's, in the width of the master weights."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    masters: float
    """fp32 copies of narrower weights."""
    gradients: float
    """Main gradients."""
    moments: float
    activations: float
    """Kept for backward, and the scores over the vocabulary."""
    buffers: float
    """Gathered units of FSDP, DDP's buckets, rows on their way."""
    copies: float
    """Copies of experts with their gradients."""
    reserved: float
    """What no tensor gets."""

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def kept(self) -> float:
        """What stays between steps."""
        return self.weights + self.masters + self.gradients + self.moments


def memory_of(
    work: Workload,
    fold: Fold,
    rows: float,
    copies: float,
    reserved: float = 0.0,
    *,
    on_cpu: bool = False,
) -> Memory:
    """Return the memory of the rank with the most ``rows``, to which ``copies`` of rows travel."""
    sizes = Sizes.of(work.model)
    shards = fold.world.size if work.dense == "fsdp" else 1
    split = sizes.dense / shards
    experts = sizes.experts / (work.ep * work.expert_tp)
    is_narrow = work.item_bytes < 4
    # FSDP keeps its shards wide, and they are masters themselves; routers are fp32 (precision.py).
    dense_width = work.wide_bytes if shards > 1 else work.item_bytes
    weights = split * dense_width + experts * work.item_bytes + sizes.routers * work.wide_bytes
    owned = experts / (fold.edp.size if work.shards_experts else 1)
    masters = work.wide_bytes * (owned + (0.0 if shards > 1 else split)) if is_narrow else 0.0
    trained = split + experts + sizes.routers
    updated = split + owned + sizes.routers
    return Memory(
        weights=weights,
        masters=masters,
        gradients=trained * work.wide_bytes,
        moments=updated * work.wide_bytes * MOMENTS,
        activations=activations(work, fold, rows, copies, on_cpu=on_cpu),
        buffers=_buffers(work, fold, sizes, copies, shards),
        copies=float(work.copy_bytes or 0),
        reserved=reserved,
    )


def activations(
    work: Workload, fold: Fold, rows: float, copies: float, *, on_cpu: bool = False
) -> float:
    """Return what is kept for backward when it begins, with the scores' own gradients.

    On a CPU the attention keeps its probabilities (kernels/torch_ops/causal_attention.py).
    """
    model, size = work.model, work.item_bytes
    layers = range(model.num_layers)
    by_layer = [_layer(work, fold, layer, rows, copies, on_cpu) for layer in layers]
    if work.recompute is True:
        # Inputs of all layers, and one layer's activations while it is computed again.
        kept = model.num_layers * fold.tokens * model.d_model * size + max(by_layer)
    else:
        kept = sum(by_layer)
    # Scores, their fp32 copy where they are narrower, log-probabilities, and two gradients.
    wide = work.wide_bytes
    scores = size + (wide if size < wide else 0) + 2 * wide
    return kept + fold.tokens * (model.vocabulary * scores + model.d_model * (2 * size + wide))


def _layer(
    work: Workload, fold: Fold, layer: int, rows: float, copies: float, on_cpu: bool
) -> float:
    """Return what autograd keeps of a layer: inputs of its products, norms and kernels."""
    model, size, tokens, moe = work.model, work.item_bytes, fold.tokens, work.model.moe
    q, k, v, out = flops.widths(model)
    # A norm keeps its input in fp32, the result without its weight, and the result.
    norm = work.wide_bytes + 2 * size
    has_norm = model.attention.qk_norm is not None and model.attention.latent is None
    kept = float(tokens) * (2 * norm * model.d_model + (v + out) * size)
    kept += tokens * (q + k) * (norm if has_norm else size)
    if on_cpu and work.sequence_length in LENGTHS:
        blocks = (work.sequence_length + BLOCK) / 2
        kept += tokens * model.num_heads * blocks * size
    if not model.is_moe(layer):
        return kept + tokens * 4 * (model.d_ff or 0) * size
    assert moe is not None
    kept += tokens * (4 if len(moe.fc1_parts) == 2 else 2) * moe.d_shared * size
    if size < work.wide_bytes:
        kept += tokens * model.d_model * work.wide_bytes  # the router reads fp32
    kept += tokens * 3 * moe.num_experts * work.wide_bytes  # logits, probabilities, their log-sum
    has_path = fold.ep.size * fold.expert_tp.size > 1
    if has_path:
        kept += copies * fold.expert_tp.size * model.d_model * size
    if work.recompute != "experts":
        kept += rows * moe.fc1_rows / work.expert_tp * size
    return kept


def _buffers(work: Workload, fold: Fold, sizes: Sizes, copies: float, shards: int) -> float:
    """Return what a step needs for a while: the largest part of it."""
    model, size, wide = work.model, work.item_bytes, work.wide_bytes
    largest = max(sizes.layers)
    root = sizes.embedding + sizes.head + sizes.last_norm
    if shards > 1:
        # The root stays gathered; a layer computes while the next one comes, and its gradient goes.
        dense = (root + 2 * largest) * size + max(root, largest) * wide
        if work.accumulation > 1:
            dense += sizes.dense * wide  # gradients of earlier micro-batches, whole
    elif fold.world.size > 1:
        dense = 2 * sizes.dense * size + BUCKET_BYTES  # gradients, DDP's buckets, one to be summed
    else:
        dense = max(root, largest) * size
    travelling = 3 * copies * model.d_model * size if fold.ep.size > 1 else 0.0
    moe = model.moe
    backward = 0.0 if moe is None else moe.matrices * copies * moe.d_expert * size
    return dense + travelling + backward
