"""The structures of arguments.h, field by field."""

import ctypes

Int, Float, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LinearArguments(ctypes.Structure):
    """``y = x w^T``."""

    _fields_ = [
        *((name, Int) for name in ("type", "rows", "width", "outputs", "threads")),
        *((name, Pointer) for name in ("x", "weight", "y")),
    ]


class NormArguments(ctypes.Structure):
    """``y = weight * x / rms(x)``."""

    _fields_ = [
        *((name, Int) for name in ("type", "rows", "width", "threads")),
        ("epsilon", Float),
        *((name, Pointer) for name in ("x", "weight", "y")),
    ]


class Biases(ctypes.Structure):
    """A bias for every slot, or none."""

    _fields_ = [*((name, Int) for name in ("type", "stride")), ("values", Pointer)]


class ExpertArguments(ctypes.Structure):
    """The expert MLP of some experts, each routed row into its own line."""

    _fields_ = [
        *((name, Int) for name in ("type", "activation", "tokens", "choices", "d_model")),
        *((name, Int) for name in ("d_expert", "num_experts", "threads")),
        *((name, Int) for name in ("fc1_stride", "fc2_stride", "is_wave")),
        *((name, Pointer) for name in ("x", "fc1", "fc2", "experts", "slot_of", "lines")),
        ("hidden", Pointer),
        *((name, Biases) for name in ("fc1_bias", "fc2_bias")),
    ]


class QuantizedMatrix(ctypes.Structure):
    """A matrix of 8 or 4 bits of all slots."""

    _fields_ = [
        *((name, Pointer) for name in ("values", "scales")),
        *((name, Int) for name in ("bits", "group", "stride", "scale_stride")),
    ]


class QuantizedExpertArguments(ctypes.Structure):
    """The expert MLP of quantized experts."""

    _fields_ = [
        ("rest", ExpertArguments),
        *((name, QuantizedMatrix) for name in ("fc1", "fc2")),
    ]


class ExpertGradArguments(ctypes.Structure):
    """The gradients of the expert MLP."""

    _fields_ = [
        ("forward", ExpertArguments),
        *((name, Pointer) for name in ("grad", "weights")),
        *((name, Int) for name in ("is_empty", "num_slots", "grad_type")),
        *((name, Pointer) for name in ("grad_fc1", "grad_fc2", "grad_fc1_bias", "grad_fc2_bias")),
        ("grad_weights", Pointer),
    ]


class GroupedArguments(ctypes.Structure):
    """Rows times the matrix of their slot."""

    _fields_ = [
        *((name, Int) for name in ("type", "num_slots", "inputs", "outputs", "threads")),
        *((name, Int) for name in ("weight_stride", "x_stride", "y_stride")),
        *((name, Pointer) for name in ("spans", "x", "y", "weights")),
    ]


class CombineArguments(ctypes.Structure):
    """The weighted sum of each token's lines."""

    _fields_ = [
        *((name, Int) for name in ("type", "tokens", "choices", "d_model", "threads")),
        *((name, Pointer) for name in ("lines", "weights", "experts", "out")),
    ]


class RouterArguments(ctypes.Structure):
    """A top-k router."""

    _fields_ = [
        *((name, Int) for name in ("type", "tokens", "d_model", "num_experts", "choices", "score")),
        *((name, Int) for name in ("renormalize", "num_groups", "top_groups")),
        *((name, Int) for name in ("group_best", "threads")),
        *((name, Float) for name in ("scale", "epsilon")),
        *((name, Pointer) for name in ("x", "weight", "logit_bias", "bias")),
        *((name, Pointer) for name in ("experts", "weights", "counts")),
    ]


class AttentionWeights(ctypes.Structure):
    """One layer's attention."""

    _fields_ = [
        *((name, Int) for name in ("type", "d_model", "num_heads", "num_kv_heads", "head_dim")),
        *((name, Int) for name in ("window", "norms_heads", "rotates")),
        *((name, Float) for name in ("epsilon", "scale", "clip")),
        *((name, Pointer) for name in ("input_norm", "q", "k", "v", "o", "output_norm")),
        *((name, Pointer) for name in ("q_norm", "k_norm")),
        *((name, Pointer) for name in ("q_bias", "k_bias", "v_bias", "o_bias", "sinks")),
    ]


class AttentionArguments(ctypes.Structure):
    """One new position of each sequence."""

    _fields_ = [
        *((name, Int) for name in ("layer", "sequences", "threads")),
        *((name, Pointer) for name in ("x", "cosine", "sine", "caches", "lengths", "capacities")),
        *((name, Pointer) for name in ("x_out", "normed")),
    ]
