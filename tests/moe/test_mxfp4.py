"""MXFP4 against a formula for one value and against transformers' own decoding."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeyard.moe.folders.mxfp4 import decode


def value(nibble: int, scale: int) -> float:
    """Read the bits: a sign, two of exponent with bias 1, one of mantissa (E2M1)."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return (-1) ** sign * magnitude * 2.0 ** (scale - 127)


def decoded(blocks, scales, dtype=torch.bfloat16):
    out = torch.full((blocks.shape[0], 32 * blocks.shape[1]), 7.0, dtype=dtype)
    decode(blocks, scales, out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_byte_and_scale_is_exact(dtype):
    """All values of all scales that the types hold, also 0 (subnormal) and the largest."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(252, 16, 16)
    scales = torch.arange(252, dtype=torch.uint8).view(252, 1).expand(252, 16)
    found = decoded(blocks, scales, dtype)
    expected = [
        [value(half, scale) for byte in range(256) for half in (byte & 15, byte >> 4)]
        for scale in range(252)
    ]
    assert torch.equal(found.double(), torch.tensor(expected, dtype=torch.float64))


def test_scale_255_is_not_a_number():
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    assert decoded(blocks, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_agrees_with_transformers(dtype):
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 6, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(90, 150, (3, 10, 6), dtype=torch.uint8, generator=g)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # transposed: [E, P, Q]
    for expert in range(3):
        found = decoded(blocks[expert], scales[expert], dtype)
        assert torch.equal(found, theirs[expert].T)


def test_interleaved_rows_are_decoded_into_halves():
    """gpt-oss alternates rows of gate and up."""
    g = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (8, 2, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(120, 130, (8, 2), dtype=torch.uint8, generator=g)
    both, whole = torch.empty(8, 64), decoded(blocks, scales, torch.float32)
    for half, rows in enumerate(both.chunk(2)):
        decode(blocks[half::2], scales[half::2], rows)
    assert torch.equal(both, torch.cat((whole[0::2], whole[1::2])))
