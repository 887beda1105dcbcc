"""What leader and owners send each other: a head of fixed size and a payload in parts.

Numbers are little-endian. Each part of a payload begins at a multiple of :data:`ALIGNMENT`, so that
kernels read rows where they arrive.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

ALIGNMENT = 64


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    """The leader's nonce."""
    CHALLENGE = 2
    """The owner's nonce and its proof that it knows the secret."""
    PROOF = 3
    """The leader's proof."""
    FACTS = 4
    """JSON: what the owner is (facts.py)."""
    BEGIN = 5
    """A forward begins: sequences, phases and lengths, int64. No answer."""
    PREFETCH = 6
    """Experts that a layer will need, int64. No answer."""
    COMPUTE = 7
    """Rows and their experts. The answer is LINES or FAILED."""
    LINES = 8
    """A line for each routed row."""
    FAILED = 9
    """JSON: which experts could not be read, and why."""


class Head(NamedTuple):
    """The head of a frame. Fields that a kind does not need are 0."""

    kind: int
    number: int = 0
    """Of the request; its answer has the same one."""
    layer: int = 0
    """Index in the decoder."""
    rows: int = 0
    choices: int = 0
    """Experts of a row, K."""
    payload: int = 0
    """Bytes, with the gaps between parts."""
    hits: int = 0
    """This and the next three are what the owner's store has counted in this layer so far."""
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    seconds: float = 0.0
    """What the owner took, from the frame's arrival to its answer."""


_HEAD = struct.Struct("<BQIIIQQQQdd")
HEAD_BYTES = _HEAD.size


def pack(head: Head) -> bytes:
    """Return the bytes of a head."""
    return _HEAD.pack(*head)


def unpack(data: bytes | memoryview) -> Head:
    """Return the head that begins ``data``."""
    return Head._make(_HEAD.unpack_from(data))


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where parts of these sizes begin in a payload, and the bytes of all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end
