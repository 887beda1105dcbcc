"""Read text files in blocks of characters; recognise files that are not text."""

from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError

BLOCK = 1 << 18
"""Characters read at a time."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
"""Kinds of compressed files by their first bytes."""
TABLES = {b"PAR1": "Parquet", b"ARROW1": "Arrow"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
MOST_NULS = 4
"""More than one NUL in so many characters means UTF-16 without a mark, or binary data."""


def read_blocks(path: Path, source: str, field: str) -> Iterator[str]:
    """Read a UTF-8 file in blocks, without its byte order mark and with plain line ends.

    ``source`` is the value of the configuration key ``field``. For a file that is not text, raises
    :class:`DataError` that says what it is.
    """
    name = f"{field} {str(path)!r}"
    try:
        with path.open("rb") as file:
            _check_beginning(name, path, file.read(8))
        with path.open(encoding="utf-8-sig") as file:
            while block := file.read(BLOCK):
                if block.count("\0") * MOST_NULS > len(block):
                    raise DataError(
                        f"{name} is full of NUL bytes, as UTF-16 and binary data are; convert it "
                        "to UTF-8 text first."
                    )
                yield block
    except OSError as error:
        raise DataError(
            f"{field} is {source!r}, which cannot be read ({error.strerror}); give 'stdlib', a "
            "text file, a .jsonl, .ndjson or .json file, a folder of these, a .bin shard or "
            "hf:NAME."
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text; convert it first.") from None


def _check_beginning(name: str, path: Path, beginning: bytes) -> None:
    for mark, kind in COMPRESSED.items():
        if beginning.startswith(mark):
            raise DataError(f"{name} is compressed ({kind}); unpack it first.")
    for mark, kind in TABLES.items():
        if beginning.startswith(mark):
            raise DataError(f"{name} is a {kind} file; give hf:{path}, which reads it.")
    if beginning.startswith(UTF_16):
        raise DataError(f"{name} is UTF-16; convert it to UTF-8 first.")
    if path.suffix.lower() == ".csv":
        raise DataError(
            f"{name} is a table; give hf:{path} to read one column of it, or give it a name that "
            "ends in .txt to train on all of it as it is."
        )
