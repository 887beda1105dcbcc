"""Build the C++ kernels once per machine and source, into the user's cache folder.

The library holds every instruction set the compiler knows for this architecture and chooses among
them when it is loaded, so one build serves all machines that share a home folder.
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
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
}
"""Compiler flags by instruction set; other architectures than x86-64 have the first alone."""

log = logging.getLogger(__name__)


class BuildError(Exception):
    """Why there is no library, in one sentence."""


def built_library() -> Path:
    """Return the path of the library, building it first where this source has none yet.

    Several processes may call this at once: one builds, the others wait for it.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    key = hashlib.sha256(" ".join([*FLAGS, platform.machine()]).encode())
    for path in sorted(SOURCES.iterdir()):
        key.update(path.read_bytes())
    folder = _cache_folder()
    target = folder / f"cpu-kernels-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
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
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "moeyard"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be made: {error.strerror}") from error
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise BuildError(f"other users may write to {folder}; run chmod go-w on it")
    if not os.access(folder, os.W_OK):
        raise BuildError(f"the cache folder {folder} is read-only")
    return folder


def _build(compiler: str, folder: Path, target: Path) -> None:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    variants = VARIANTS if is_x86 else {"portable": ()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = {name: f"{scratch}/{name}.o" for name in variants}
        library = f"{scratch}/library.so"
        commands = [
            [*flags, f"-DISA={name}", "-c", str(SOURCES / "kernels.cpp"), "-o", objects[name]]
            for name, flags in variants.items()
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda arguments: _run([compiler, *FLAGS, *arguments]), commands))
        plain = [str(SOURCES / name) for name in ("library.cpp", "pool.cpp")]
        link = ["-shared", *plain, *objects.values(), "-o", library]
        _run([compiler, *FLAGS, *link])
        Path(library).replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise BuildError(f"{command[0]} ended with {done.returncode}: {reason}")
