"""Attention: which kernels run it.

T rows of all sequences, B sequences of length L, Q query heads, G key/value heads, H head width.

Two operations have kernels here: causal attention in training, and new rows of sequences that have
a cache. Everything else is ``F.scaled_dot_product_attention`` (moe/attention).
"""

from collections.abc import Sequence

from torch import Tensor

from .cpu.attention import AttentionModules as AttentionModules
from .cpu.attention import AttentionOptions as AttentionOptions
from .cpu.attention import RowAttention as RowAttention
from .cpu.cached_rows import BLOCK as BLOCK
from .cpu.cached_rows import Cache as Cache
from .cpu.cached_rows import NewRows as NewRows
from .cpu.cached_rows import attend_cached as attend_cached
from .cpu.cached_rows import fits_kernels
from .cpu.library import functions_for
from .torch_ops import causal_attention
from .trust import may_use_cpp


def attend_causally(q_BLQH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor) -> Tensor | None:
    """Return ``softmax(q k^T / sqrt(H) below the diagonal) v`` with its backward, ``[B, L, Q, H]``.

    None if ``F.scaled_dot_product_attention`` is faster: on a GPU, without gradients, and for
    very short or very long sequences.
    """
    if not causal_attention.can_run(q_BLQH):
        return None
    out_BLQH: Tensor = causal_attention.CausalAttention.apply(q_BLQH, k_BLGH, v_BLGH)
    return out_BLQH


def can_attend_rows(rope: tuple[Tensor, Tensor]) -> bool:
    """Say whether the C++ kernels may take rows with these cosines and sines."""
    return may_use_cpp(rope[0]) and functions_for(*rope) is not None


def can_attend_keys(key_width: int, like: Tensor) -> bool:
    """Say whether, without gradients, they run for keys of this width and rows like ``like``."""
    return may_use_cpp(like) and fits_kernels(key_width, like.dtype)


def prepare_rows(caches: Sequence[Cache], counts: Sequence[int]) -> NewRows:
    """Make room for each sequence's new rows, once for all layers of a step."""
    return NewRows(caches, counts)
