"""Generation without a server where guesses of next tokens are checked, several in one forward.

N rows of a text that a token follows, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import ExpertReadError
from ...kernels.values.memory import is_out_of_memory
from ..adapters.adapter import Adapter
from ..drafts.speculation import Speculation
from ..drafts.text import TextDrafts
from ..kv_cache import SequenceCache
from ..routers.causal import check_causal
from .decoder import Decoder
from .draft_rows import TextRows, run_rows
from .generation import GenerationLimits
from .sampling import sample


@torch.inference_mode()
def drafted_rows(
    decoder: Decoder,
    rows: Sequence[Tensor],
    limits: GenerationLimits,
    speculation: Speculation,
    adapter: Adapter | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every row, as ``continue_rows`` does: the same tokens.

    A forward reads the guesses of a row after its last token, and a token is drawn after each of
    them, up to the first that was not guessed. A row whose guesses are right gets ahead of the
    others; its tokens wait until they are yielded.
    """
    for router in decoder.routers():
        check_causal(router.config)
    texts = [_Text(decoder, ids_T, limits, row) for row, ids_T in enumerate(rows)]
    for _ in range(limits.max_new_tokens):
        while not all(text.coming or text.has_ended for text in texts):
            _step(decoder, [text for text in texts if text.num_left], speculation, adapter)
        yield [text.coming.popleft() if text.coming else text.ids[-1] for text in texts]
        if all(text.has_ended and not text.coming for text in texts):
            return


class _Text:
    """One row: its ids, its cache and its random numbers."""

    def __init__(self, decoder: Decoder, ids_T: Tensor, limits: GenerationLimits, row: int) -> None:
        self.ids: list[int] = ids_T.tolist()
        self.cache: SequenceCache = decoder.new_cache(len(ids_T) + limits.max_new_tokens)
        self.core = decoder.new_core(len(ids_T))
        self.drafts: TextDrafts | None = None
        self.coming = deque[int]()
        """Tokens that were drawn and not yielded."""
        self._limits = limits
        self._most = len(ids_T) + limits.max_new_tokens
        self._generator = torch.Generator()
        if limits.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(limits.seed + row)
        self.has_ended = False
        """True after an end-of-text id."""

    @property
    def generates(self) -> bool:
        """True once the prompt has been read."""
        return self.cache.length > 0

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still get."""
        return 0 if self.has_ended else self._most - len(self.ids)

    @property
    def drafted(self) -> tuple[int, ...]:
        """Guessed ids that the next forward reads after the last token."""
        return () if self.drafts is None else self.drafts.ids

    def ids_from(self, start: int) -> tuple[int, ...]:
        """Return the ids from a place on."""
        return tuple(self.ids[start:])

    def next_ids(self) -> tuple[int, ...]:
        """Return what the next forward reads."""
        return (*self.ids[self.cache.length :], *self.drafted)

    def draw(self, logits_NV: Tensor) -> int:
        """Draw a token from each row as if it were alone, up to the first that was not guessed.

        Returns how many there are; the cache then ends before the last of them.
        """
        start = self.cache.length - len(self.drafted)
        for row, logits_V in enumerate(logits_NV):
            token = sample(logits_V, self._limits.sampling, self._generator)
            self.ids.append(token)
            self.coming.append(token)
            self.has_ended = token in self._limits.eos_ids
            if self.has_ended or self.drafted[row : row + 1] != (token,):
                break
        self.cache.length = start + row
        return row + 1


def _step(
    decoder: Decoder, texts: list[_Text], speculation: Speculation, adapter: Adapter | None
) -> None:
    """Take texts further: the first time through their prompts, then by a token or more."""
    speculation.begin(texts)
    lengths = [text.cache.length for text in texts]
    have_failed = False
    try:
        logits = _scores(decoder, texts, adapter)
    except (ExpertReadError, RuntimeError, MemoryError) as error:
        is_theirs = isinstance(error, ExpertReadError) or is_out_of_memory(error)
        if not is_theirs or not any(text.drafted for text in texts):
            raise
        have_failed = True
    if have_failed:
        # Again, without guesses; not in the except clause: the error keeps the forward's tensors.
        for text, length in zip(texts, lengths, strict=True):
            text.cache.length = length
            if text.drafts is not None:
                text.drafts.drop()
        logits = _scores(decoder, texts, adapter)
    for text, logits_NV in zip(texts, logits, strict=True):
        num_drafted = len(text.drafted)
        speculation.taken(num_drafted, text.draw(logits_NV) - 1)
    speculation.end(sum(len(logits_NV) for logits_NV in logits))


def _scores(decoder: Decoder, texts: list[_Text], adapter: Adapter | None) -> list[Tensor]:
    """Run the next rows of texts; return the scores after the last known and each guessed id."""
    turns = []
    for text in texts:
        ids = text.next_ids()
        text.cache.reserve(len(ids))
        turns.append(TextRows(text.cache, ids, adapter, len(text.drafted), text.core))
    chunks = run_rows(decoder, turns).hidden_TD.split([len(turn.ids) for turn in turns])
    counts = [1 + turn.num_drafted for turn in turns]
    wanted = [chunk[-count:] for chunk, count in zip(chunks, counts, strict=True)]
    return list(decoder.logits(torch.cat(wanted)).split(counts))
