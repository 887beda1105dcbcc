"""Build the C++ kernels once per machine and source, into the user's cache folder.

The library holds every instruction set the compiler knows for this architecture and chooses among
them when it is loaded, so one build serves all machines of a kind that share a home folder.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    # Each kernel keeps its own order of summation: nothing here lets the compiler reorder sums.
    *("-std=c++20", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-w"),
)
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VARIANTS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni"),
}
"""Compiler flags by instruction set; only x86-64 has more than the first."""

log = logging.getLogger(__name__)


class BuildError(Exception):
    """The library could not be built; the message is one sentence."""


def built_library() -> Path:
    """Return the path of the library, building it first if this source has no build yet.

    Several processes may call this at the same time: one builds, the others wait for it.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    facts = [*FLAGS, platform.machine(), *platform.libc_ver()]
    key = hashlib.sha256(" ".join(facts).encode())
    for path in sorted(SOURCES.iterdir()):
        key.update(path.read_bytes())
    folder = _cache_folder()
    target = folder / f"cpu-kernels-{key.hexdigest()[:16]}.so"
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
            log.warning("building the CPU kernels with %s; this happens once", compiler)
            _build(compiler, folder, target)
    return target


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


def _build(compiler: str, folder: Path, target: Path) -> None:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    variants = VARIANTS if is_x86 else {"portable": ()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def compiled(name: str) -> str | None:
            """Return the object file of a variant; None where the compiler is too old for it."""
            path = f"{scratch}/{name}.o"
            source = ["-c", str(SOURCES / "kernels.cpp"), "-o", path]
            try:
                _run([compiler, *FLAGS, *variants[name], f"-DISA={name}", *source])
            except BuildError:
                if name == "portable":
                    raise
                return None
            return path

        with ThreadPoolExecutor() as pool:
            objects = dict(zip(variants, pool.map(compiled, variants), strict=True))
        found = [name for name, path in objects.items() if path is not None]
        library = f"{scratch}/library.so"
        parts = [str(SOURCES / name) for name in ("library.cpp", "pool.cpp")]
        parts += [objects[name] or "" for name in found]
        has = [f"-DHAS_{name}" for name in found]
        _run([compiler, *FLAGS, *has, "-shared", *parts, "-o", library])
        Path(library).replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise BuildError(f"{command[0]} ended with {done.returncode}: {reason}")
