"""Errors of the tokenizer library, which have no common class."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...errors import MoeyardError


@contextmanager
def library_errors(make: Callable[[str], MoeyardError]) -> Iterator[None]:
    """Replace every error of the tokenizer library by the error that ``make`` returns.

    Its panics are not an ``Exception``, so no handler would catch them.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise make(reason) from None
