"""What the scheduler knows of a request: its tokens, its place in the order, its blocks."""

from dataclasses import dataclass, field

from .block_hashes import extend_hashes


@dataclass(slots=True, eq=False)
class Job:
    """A request as the scheduler sees it. A token is read when its keys and values are stored."""

    request_id: str
    ids: list[int]
    """The prompt, then what was generated."""
    num_prompt: int
    chunk: int | None = None
    """Chunks of the prompt end at multiples of this number, because a row's bits depend on its
    chunk; None where they do not, and any chunk will do."""
    priority: int = 0
    """Lower ones come first."""
    salt: bytes | None = b""
    """Only requests with equal salts take over each other's blocks; None = never."""
    scores_prompt: bool = False
    """It must read its whole prompt itself, at least until the first token is generated."""
    group: str = ""
    """Answers to one prompt have the same group: one of them reads it for all. Empty = alone."""
    order: int = 0
    """The place among all requests, by arrival."""
    blocks: list[int] = field(default_factory=list)
    """In the order of the positions that they hold; none while the request waits."""
    num_read: int = 0
    num_published: int = 0
    """Units of blocks, from the first one, that others may find."""
    num_reused: int | None = None
    """Tokens of the prompt that were taken over when the request first got blocks; None before."""
    num_known_when_lost: int = 0
    """Its tokens when it last lost its blocks."""
    last_turn: int = -1
    """The last step in which it read a part of its prompt."""
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """The order in which requests are served, lowest first."""
        return self.priority, self.order

    @property
    def num_left(self) -> int:
        """Known tokens that are not read."""
        return len(self.ids) - self.num_read

    @property
    def reads_prompt(self) -> bool:
        """True until the prompt has been read."""
        return self.num_read < self.num_prompt

    @property
    def has_begun(self) -> bool:
        """True once a token has been generated."""
        return len(self.ids) > self.num_prompt

    @property
    def has_just_returned(self) -> bool:
        """True from the loss of its blocks until it has generated a further token."""
        return len(self.ids) <= self.num_known_when_lost

    @property
    def goes_by_rows(self) -> bool:
        """True for one row a step: the last token, or generated ones that must be read again as
        they were the first time."""
        return not self.reads_prompt and (self.num_left == 1 or self.chunk is not None)

    @property
    def next_chunk(self) -> int:
        """The most rows that one step may read."""
        if self.chunk is None:
            return self.num_left
        end = (self.num_read // self.chunk + 1) * self.chunk
        return min(end, self.num_prompt) - self.num_read

    def change_weights(self, salt: bytes | None) -> None:
        """Hear that keys and values from now on are those of other weights.

        A request that has read tokens goes on, and shares its mixed blocks with no other.
        """
        self.salt = None if self.blocks else salt
        self._hashes.clear()

    def names(self, first: int, end: int, unit: int, block: int) -> list[bytes]:
        """Return the names of the blocks of units ``first`` to ``end``.

        A unit is what can be taken over: one or more blocks, whose names tell all tokens up to the
        end of their unit.
        """
        assert self.salt is not None, "blocks without a salt have no names"
        extend_hashes(self._hashes, self.ids, end, unit, self.salt)
        places = [index.to_bytes(4, "little") for index in range(unit // block)]
        return [unit_hash + place for unit_hash in self._hashes[first:end] for place in places]
