"""Which tensors have which type."""

import torch

from ..moe.decoder import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def apply_precision(model: Decoder, precision: str) -> None:
    """Cast ``model`` in place; under bf16 the routers stay in fp32.

    Masters and main gradients are fp32 by construction (optimizer.py, parallel/gradients.py).
    """
    dtype = DTYPES[precision]
    model.to(dtype)
    if dtype == torch.bfloat16:
        for router in model.routers():
            router.to(torch.float32)
