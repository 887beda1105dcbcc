"""What an encoder reads around a text: BERT's [CLS] and [SEP], or a single mark in front."""

from typing import Any, NamedTuple


class TextMarks(NamedTuple):
    """Ids before and after every text."""

    before: tuple[int, ...]
    """At least one: the head reads the row of the first."""
    after: tuple[int, ...]

    def around(self, ids: list[int], length: int) -> list[int]:
        """Return a text's ids between the marks, cut at its end to ``length`` ids in all."""
        room = length - len(self.before) - len(self.after)
        return [*self.before, *ids[: max(room, 0)], *self.after][:length]

    def cuts(self, num_ids: int, length: int) -> bool:
        """Say whether a text of ``num_ids`` does not fit whole."""
        return len(self.before) + num_ids + len(self.after) > length


def end_of_text(tokenizer: Any) -> int | None:
    """Return the id that ends a text: ``eos_token``, or else ``sep_token`` as BERT has it."""
    end = tokenizer.eos_token_id
    found: int | None = tokenizer.sep_token_id if end is None else end
    return found


def marks_of(tokenizer: Any) -> TextMarks:
    """Return the marks of transformers' ``tokenizer``.

    BERT's are [CLS] and [SEP]. A tokenizer without ``cls_token`` has its first or its last mark of
    language models in front, and nothing behind.
    """
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is not None:
        return TextMarks((first,), () if last is None else (last,))
    first = tokenizer.bos_token_id
    first = end_of_text(tokenizer) if first is None else first
    return TextMarks(() if first is None else (first,), ())
