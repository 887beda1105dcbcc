"""Names of full blocks: a block's hash tells its tokens and all tokens before it."""

import hashlib
from array import array
from collections.abc import Sequence


def extend_hashes(
    hashes: list[bytes], ids: Sequence[int], num_blocks: int, block: int, salt: bytes
) -> None:
    """Append to ``hashes`` until it has those of the first ``num_blocks`` blocks of ``ids``.

    The hash is SHA-256, for which no two inputs with one result are known. So a hash stands for its
    text, and texts with different salts share no hash.
    """
    before = hashes[-1] if hashes else hashlib.sha256(salt).digest()
    for index in range(len(hashes), num_blocks):
        tokens = array("q", ids[index * block : (index + 1) * block])
        before = hashlib.sha256(before + tokens.tobytes()).digest()
        hashes.append(before)
