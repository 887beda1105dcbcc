"""Who has which block of the memory for keys and values. No tensors: blocks are numbers.

A block is in exactly one state:

- free: no sequence has it, and what it holds is of no use;
- used: one or more sequences have it;
- cached: no sequence has it, but it is full and its hash is known, so another one may take it
  over. When blocks run short, the cached block that was given back longest ago becomes free.
"""

from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks of one memory."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # A stack: blocks used lately are used again first, so memory is touched late.
        self._free = list(reversed(range(num_blocks)))
        self._num_users = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: dict[int, None] = {}
        """The cached blocks, the one given back longest ago first."""

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing of use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that no sequence has and that may be taken over."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences have."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`take` can give."""
        return self.num_free + self.num_cached

    def num_users(self, block: int) -> int:
        """Return how many sequences have a block."""
        return self._num_users[block]

    def take(self, count: int) -> list[int]:
        """Return blocks with one user each; there must be ``count`` available."""
        assert count <= self.num_available, f"{count} blocks asked for, {self.num_available} there"
        while len(self._free) < count:
            self._forget(next(iter(self._cached)))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._num_users[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to blocks that are used or cached."""
        for block in blocks:
            assert self._num_users[block] or block in self._cached, f"block {block} is free"
            self._cached.pop(block, None)
            self._num_users[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take a user from blocks, which are in the order of their sequence.

        Those without another user are cached if their hash is known, and free otherwise.
        """
        # The last ones first: what begins a text is of use to more texts than what ends it.
        for block in reversed(blocks):
            assert self._num_users[block], f"block {block} has no user"
            self._num_users[block] -= 1
            if self._num_users[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, name: bytes) -> None:
        """Let a full used block be found by its hash, unless another one has that hash already."""
        assert self._num_users[block], f"block {block} has no user"
        if name not in self._block_of and block not in self._hash_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the blocks of the first hashes, up to one that is not known. Adds no users."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def count_cached(self, blocks: Iterable[int]) -> int:
        """Return how many of some blocks are cached: sharing these leaves fewer available."""
        return sum(block in self._cached for block in blocks)

    def _forget(self, block: int) -> None:
        """Make a cached block free."""
        del self._cached[block]
        del self._block_of[self._hash_of.pop(block)]
        self._free.append(block)
