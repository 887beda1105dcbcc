"""The tokenizer of a Hugging Face folder. Its library fails in ways of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MoeyardError
from ..files import check_small_file
from .json_file import read_json

READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Of the files that transformers looks for in a folder."""
MAX_BYTES = 64 << 20
"""Of one such file; the largest tokenizer.json in use has 33 MB."""


def open_tokenizer(folder: Path, make: Callable[[str], MoeyardError]) -> Any:
    """Return transformers' tokenizer of a folder, or raise what ``make`` says of the reason."""
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    for path in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        if path.suffix in READ_SUFFIXES and not path.is_dir():
            try:
                check_small_file(path, MAX_BYTES)
            except OSError as error:
                raise make(f"{path.name}: {error.strerror}") from None
    if settings.exists():
        read_json(settings)
    with library_errors(make):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def library_errors(make: Callable[[str], MoeyardError]) -> Iterator[None]:
    """Raise what ``make`` says in place of whatever the tokenizer library raises.

    Its panics are no ``Exception``: they would go past every handler.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise make(reason) from None
