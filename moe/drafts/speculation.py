"""Which guesses run as rows of a step, and what came of them."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from time import perf_counter
from typing import Protocol

from .costs import StepCosts, share_rows
from .drafter import Drafter
from .tally import DraftTally
from .text import TextDrafts

TRY_EVERY = 64
"""Steps after which rows run that do not seem to pay: their cost is measured again."""


class Text(Protocol):
    """What is asked of a text that goes on."""

    drafts: TextDrafts | None

    @property
    def generates(self) -> bool:
        """True when the next forward reads the last generated token and nothing before it."""
        ...

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still get."""
        ...

    def ids_from(self, start: int) -> tuple[int, ...]:
        """Return the text's ids from a place on, as far as they are read or generated."""
        ...


class Speculation:
    """Gives the texts of a step their drafted rows; used by one thread.

    Rows go to the guesses that are likeliest to be right, and only as long as they raise the tokens
    per second by what was measured. All numbers of a row stay those of a step without drafts, so
    nothing here can change an answer.
    """

    def __init__(
        self,
        make_drafter: Callable[[], Drafter],
        most_rows: int,
        tally: DraftTally,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._make_drafter = make_drafter
        self._most_rows = most_rows
        self._clock = clock
        self._tally = tally
        self._costs = StepCosts()
        self._num_steps = 0
        self._started = 0.0
        self._num_texts = self._num_drafted = 0
        """Of the step that runs: texts that generate, and drafted rows."""
        self._is_plain = False
        """Whether no text reads its prompt in the step that runs."""

    def begin(self, texts: Items[Text]) -> None:
        """Choose the drafted rows of a step, before it runs."""
        self._started = self._clock()
        self._num_steps += 1
        generating, chances = list[TextDrafts](), list[list[float]]()
        for text in texts:
            if text.drafts is None:
                text.drafts = TextDrafts(self._make_drafter())
            text.drafts.drop()
            text.drafts.read(text.ids_from(text.drafts.num_read))
            if text.generates:
                generating.append(text.drafts)
                chances.append(text.drafts.guess(text.num_left - 1))
        counts = share_rows(chances, len(generating), self._costs, self._most_rows)
        if self._num_steps % TRY_EVERY == 0 and not any(counts):
            counts = [int(bool(own) and at < self._most_rows) for at, own in enumerate(chances)]
        for drafts, count in zip(generating, counts, strict=True):
            drafts.use(count)
        self._num_texts, self._num_drafted = len(generating), sum(counts)
        self._is_plain = len(generating) == len(texts)

    def taken(self, num_drafted: int, num_accepted: int) -> None:
        """Count the drafted rows of one text, and how many of them were right."""
        if num_drafted == 0:
            return
        seconds = self._costs.seconds(self._num_texts) / self._num_texts
        cost_s, saved_s = num_drafted * self._costs.per_row, num_accepted * seconds
        self._tally.add(num_drafted, num_accepted, cost_s, saved_s)

    def end(self, num_rows: int) -> None:
        """Learn what the step cost, when its tokens are drawn; ``num_rows`` were computed.

        A step with a prompt, or with a failure, is no measure.
        """
        if self._is_plain and num_rows == self._num_texts + self._num_drafted:
            self._costs.add(num_rows, self._clock() - self._started)
