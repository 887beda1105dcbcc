"""The structures of arguments.h, field by field. Fill them by keyword, never by position."""

import ctypes

Int, Float, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LinearArguments(ctypes.Structure):
    """``y = x w^T``."""

    _fields_ = [
        ("type", Int),
        ("rows", Int),
        ("width", Int),
        ("outputs", Int),
        ("threads", Int),
        ("x", Pointer),
        ("weight", Pointer),
        ("y", Pointer),
    ]


class NormArguments(ctypes.Structure):
    """``y = weight * x / rms(x)``."""

    _fields_ = [
        ("type", Int),
        ("rows", Int),
        ("width", Int),
        ("threads", Int),
        ("epsilon", Float),
        ("x", Pointer),
        ("weight", Pointer),
        ("y", Pointer),
    ]


class GatedArguments(ctypes.Structure):
    """``y = act(gate) * factor(up)``."""

    _fields_ = [
        ("type", Int),
        ("activation", Int),
        ("rows", Int),
        ("width", Int),
        ("threads", Int),
        ("x", Pointer),
        ("y", Pointer),
    ]


class Biases(ctypes.Structure):
    """A bias for every slot, or none."""

    _fields_ = [
        ("type", Int),
        ("stride", Int),
        ("values", Pointer),
    ]


class ExpertArguments(ctypes.Structure):
    """The expert MLP of some experts, each routed row into its own line."""

    _fields_ = [
        ("type", Int),
        ("activation", Int),
        ("tokens", Int),
        ("choices", Int),
        ("d_model", Int),
        ("d_expert", Int),
        ("num_experts", Int),
        ("threads", Int),
        ("fc1_stride", Int),
        ("fc2_stride", Int),
        ("is_wave", Int),
        ("x", Pointer),
        ("fc1", Pointer),
        ("fc2", Pointer),
        ("experts", Pointer),
        ("slot_of", Pointer),
        ("lines", Pointer),
        ("hidden", Pointer),
        ("fc1_bias", Biases),
        ("fc2_bias", Biases),
    ]


class QuantizedMatrix(ctypes.Structure):
    """A matrix of 8 or 4 bits of all slots."""

    _fields_ = [
        ("values", Pointer),
        ("scales", Pointer),
        ("bits", Int),
        ("group", Int),
        ("stride", Int),
        ("scale_stride", Int),
    ]


class QuantizedExpertArguments(ctypes.Structure):
    """The expert MLP of quantized experts."""

    _fields_ = [
        ("rest", ExpertArguments),
        ("fc1", QuantizedMatrix),
        ("fc2", QuantizedMatrix),
    ]


class GroupSparseMatrix(ctypes.Structure):
    """A group-sparse matrix of all slots."""

    _fields_ = [
        ("values", Pointer),
        ("columns", Pointer),
        ("scales", Pointer),
        ("kept", Int),
        ("column_bytes", Int),
        ("value_stride", Int),
        ("column_stride", Int),
        ("scale_stride", Int),
    ]


class GroupSparseExpertArguments(ctypes.Structure):
    """The expert MLP of group-sparse experts."""

    _fields_ = [
        ("rest", ExpertArguments),
        ("fc1", GroupSparseMatrix),
        ("fc2", GroupSparseMatrix),
    ]


class TwoOfFourMatrix(ctypes.Structure):
    """A 2:4 matrix of all slots."""

    _fields_ = [
        ("values", Pointer),
        ("places", Pointer),
        ("value_stride", Int),
        ("place_stride", Int),
    ]


class TwoOfFourExpertArguments(ctypes.Structure):
    """The expert MLP of 2:4 experts."""

    _fields_ = [
        ("rest", ExpertArguments),
        ("fc1", TwoOfFourMatrix),
        ("fc2", TwoOfFourMatrix),
    ]


class ChannelExpertArguments(ctypes.Structure):
    """The expert MLP of experts with channels that may be skipped."""

    _fields_ = [
        ("rest", ExpertArguments),
        ("by_input", Int),
        ("x_limits", Pointer),
        ("gate_limits", Pointer),
        ("act_limits", Pointer),
        ("used", Pointer),
        ("act", Pointer),
    ]


class LiveChannelArguments(ctypes.Structure):
    """Which channels of experts some row needs."""

    _fields_ = [
        ("of", ChannelExpertArguments),
        ("line_of", Pointer),
        ("live", Pointer),
    ]


class ExpertGradArguments(ctypes.Structure):
    """The gradients of the expert MLP."""

    _fields_ = [
        ("forward", ExpertArguments),
        ("grad", Pointer),
        ("weights", Pointer),
        ("is_empty", Int),
        ("num_slots", Int),
        ("grad_type", Int),
        ("grad_fc1", Pointer),
        ("grad_fc2", Pointer),
        ("grad_fc1_bias", Pointer),
        ("grad_fc2_bias", Pointer),
        ("grad_weights", Pointer),
    ]


class GroupedArguments(ctypes.Structure):
    """Rows times the matrix of their slot."""

    _fields_ = [
        ("type", Int),
        ("num_slots", Int),
        ("inputs", Int),
        ("outputs", Int),
        ("threads", Int),
        ("weight_stride", Int),
        ("x_stride", Int),
        ("y_stride", Int),
        ("spans", Pointer),
        ("x", Pointer),
        ("y", Pointer),
        ("weights", Pointer),
    ]


class CombineArguments(ctypes.Structure):
    """The weighted sum of each token's lines."""

    _fields_ = [
        ("type", Int),
        ("tokens", Int),
        ("choices", Int),
        ("d_model", Int),
        ("threads", Int),
        ("lines", Pointer),
        ("weights", Pointer),
        ("experts", Pointer),
        ("out", Pointer),
    ]


class RouterArguments(ctypes.Structure):
    """A top-k router."""

    _fields_ = [
        ("type", Int),
        ("tokens", Int),
        ("d_model", Int),
        ("num_experts", Int),
        ("choices", Int),
        ("score", Int),
        ("renormalize", Int),
        ("num_groups", Int),
        ("top_groups", Int),
        ("group_best", Int),
        ("threads", Int),
        ("scale", Float),
        ("epsilon", Float),
        ("x", Pointer),
        ("weight", Pointer),
        ("logit_bias", Pointer),
        ("bias", Pointer),
        ("given", Pointer),
        ("experts", Pointer),
        ("weights", Pointer),
        ("counts", Pointer),
    ]


class ForetellArguments(ctypes.Structure):
    """What the routers of some layers would choose."""

    _fields_ = [
        ("type", Int),
        ("tokens", Int),
        ("d_model", Int),
        ("layers", Int),
        ("num_experts", Int),
        ("choices", Int),
        ("named", Int),
        ("is_sigmoid", Int),
        ("threads", Int),
        ("sharpness", Float),
        ("x", Pointer),
        ("weight", Pointer),
        ("bias", Pointer),
        ("corrections", Pointer),
        ("experts", Pointer),
        ("chances", Pointer),
    ]


class AttentionWeights(ctypes.Structure):
    """One layer's attention."""

    _fields_ = [
        ("type", Int),
        ("d_model", Int),
        ("num_heads", Int),
        ("num_kv_heads", Int),
        ("head_dim", Int),
        ("window", Int),
        ("norms_heads", Int),
        ("rotates", Int),
        ("epsilon", Float),
        ("scale", Float),
        ("clip", Float),
        ("input_norm", Pointer),
        ("q", Pointer),
        ("k", Pointer),
        ("v", Pointer),
        ("o", Pointer),
        ("output_norm", Pointer),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
        ("q_bias", Pointer),
        ("k_bias", Pointer),
        ("v_bias", Pointer),
        ("o_bias", Pointer),
        ("sinks", Pointer),
    ]


class CachedRows(ctypes.Structure):
    """The memory of keys and values of some sequences, of which each adds rows."""

    _fields_ = [
        ("sequences", Int),
        ("rows", Int),
        ("caches", Pointer),
        ("tables", Pointer),
        ("lengths", Pointer),
        ("counts", Pointer),
        ("capacities", Pointer),
        ("are_int8", Pointer),
    ]


class AttentionArguments(ctypes.Structure):
    """A layer's attention with what is around it, for all rows of some sequences."""

    _fields_ = [
        ("to", Pointer),
        ("layer", Int),
        ("threads", Int),
        ("x", Pointer),
        ("cosine", Pointer),
        ("sine", Pointer),
        ("x_out", Pointer),
        ("normed", Pointer),
    ]


class AttendArguments(ctypes.Structure):
    """Attention alone, of finished queries, keys and values."""

    _fields_ = [
        ("to", Pointer),
        ("layer", Int),
        ("threads", Int),
        ("type", Int),
        ("num_heads", Int),
        ("num_kv_heads", Int),
        ("key_width", Int),
        ("value_width", Int),
        ("values_in_keys", Int),
        ("window", Int),
        ("scale", Float),
        ("q", Pointer),
        ("k", Pointer),
        ("v", Pointer),
        ("sinks", Pointer),
        ("out", Pointer),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    LinearArguments,
    NormArguments,
    GatedArguments,
    Biases,
    ExpertArguments,
    QuantizedMatrix,
    QuantizedExpertArguments,
    GroupSparseMatrix,
    GroupSparseExpertArguments,
    TwoOfFourMatrix,
    TwoOfFourExpertArguments,
    ChannelExpertArguments,
    LiveChannelArguments,
    ExpertGradArguments,
    GroupedArguments,
    CombineArguments,
    RouterArguments,
    ForetellArguments,
    AttentionWeights,
    CachedRows,
    AttentionArguments,
    AttendArguments,
)
"""In the order of ``moeyard_sizes`` (library.cpp)."""


def misfit(functions: ctypes.CDLL) -> str | None:
    """Say which structure has a different size in the library, or None.

    A field that exists on one side only would shift all pointers after it.
    """
    functions.moeyard_sizes.restype = ctypes.POINTER(Int)
    sizes = functions.moeyard_sizes()  # ends with 0
    for place, structure in enumerate(STRUCTURES):
        here, there = ctypes.sizeof(structure), sizes[place]
        if here != there:
            return f"{structure.__name__} has {there} bytes in the library, but {here} here"
    return None if sizes[len(STRUCTURES)] == 0 else "the library has structures that are not here"
