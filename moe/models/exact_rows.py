"""Whether rows of sequences with caches have bits that depend on the tokens before them alone."""

from ...kernels.attention import can_attend_keys
from ...kernels.trust import may_use_cpp
from ..experts.resident import Experts
from ..layer import MoELayer
from .decoder import Decoder
from .decoder_layer import DecoderLayer


def rows_are_exact(decoder: Decoder) -> bool:
    """Say whether, without gradients, a row of a sequence with a cache has the same bits always.

    They then depend on the tokens before it in its text, its adapter and the weights: not on the
    chunk it is read in, the other sequences, or where its keys are. So what one request computed
    is what another one would compute, at every position. This is so where the C++ kernels run all
    of the model. Elsewhere, in bf16, only whole chunks with fixed boundaries have this property.
    """
    like = decoder.embed_tokens.weight
    if not may_use_cpp(like):
        return False
    for layer in decoder.layers:
        if not isinstance(layer, DecoderLayer):
            return False  # a part of the model is elsewhere
        attention = layer.self_attn
        if not can_attend_keys(attention.cache_spec().head_dim, like) or not attention.fits_kernels:
            return False
        experts = layer.mlp.experts if isinstance(layer.mlp, MoELayer) else None
        if isinstance(experts, Experts) and experts.backend not in ("auto", "cpp"):
            return False
    outside = [
        parameter
        for name, parameter in decoder.named_parameters()
        if ".gate." not in name and ".experts." not in name
    ]
    return all(parameter.dtype == like.dtype and parameter.is_cpu for parameter in outside)
