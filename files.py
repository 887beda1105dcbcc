"""Write files and folders whole or not at all, and read files that others may have made."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; a crash leaves either the old contents or the new."""
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give the path of a hidden file to write, which then takes the place of ``path``.

    A crash or an error leaves either the old contents or the new.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty hidden folder to fill, which is then flushed to disk and becomes ``target``.

    An error leaves nothing behind; what a killed attempt has left is removed.
    """
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)
        unfinished.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Return the contents of an untrusted file.

    Raises ``OSError`` for pipes and devices, which might never end, and for more than
    ``max_bytes``.
    """
    # O_NONBLOCK: opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        _check_status(path, os.fstat(descriptor), max_bytes)
        return file.read()


def check_small_file(path: Path, max_bytes: int) -> None:
    """Raise ``OSError`` if :func:`read_small_file` would, for libraries that open files."""
    _check_status(path, path.stat(), max_bytes)


def _check_status(path: Path, status: os.stat_result, max_bytes: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device", str(path))
    if status.st_size > max_bytes:
        reason = f"it has {status.st_size} bytes, at most {max_bytes} are read"
        raise OSError(errno.EFBIG, reason, str(path))
