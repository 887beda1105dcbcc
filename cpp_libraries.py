"""Build C++ libraries once per machine and source, into the user's cache folder."""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")

log = logging.getLogger(__name__)

Make = Callable[[str, Path], Path]
"""Gets a compiler and an empty folder; makes a library there and returns its path."""


class BuildError(Exception):
    """The library could not be built; the message is one sentence."""


def built(name: str, what: str, sources: Path, flags: Sequence[str], make: Make) -> Path:
    """Return the path of a library, building it first if its ``sources`` have no build yet.

    ``name`` begins the name of its file, and ``what`` tells people what is built. ``flags`` are
    part of what tells builds apart. Several processes may call this at the same time: one builds,
    the others wait for it. Raises :class:`BuildError`.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    facts = [*flags, platform.machine(), *platform.libc_ver()]
    key = hashlib.sha256(" ".join(facts).encode())
    for path in sorted(sources.iterdir()):
        key.update(path.read_bytes())
    folder = _cache_folder()
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if target.exists():
        _check_owner(target)
        return target
    if not os.access(folder, os.W_OK):
        raise BuildError(f"the cache folder {folder} is read-only")
    if compiler is None:
        raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is installed")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            log.warning("building %s with %s; this happens once", what, compiler)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                make(compiler, Path(scratch)).replace(target)
    return target


def run_compiler(command: Sequence[str]) -> None:
    """Run a compiler; raises :class:`BuildError` with the first error that it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise BuildError(f"{command[0]} ended with {done.returncode}: {reason}")


def _cache_folder() -> Path:
    """Return a folder that only this user may write to: its library will be loaded as code."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise BuildError("no home folder to keep them in; set XDG_CACHE_HOME") from error
    folder = root / "moeyard"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be made: {error.strerror}") from error
    _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    facts = path.stat()
    if facts.st_uid != os.getuid():
        raise BuildError(f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of yours")
    if facts.st_mode & 0o022:
        raise BuildError(f"other users may write to {path}; delete it, for they may have")
