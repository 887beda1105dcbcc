"""Build the C++ kernels once per machine and source, into the user's cache folder.

The library holds every instruction set the compiler knows for this architecture and chooses among
them when it is loaded, so one build serves all machines of a kind that share a home folder.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...cpp_libraries import BuildError, built, run_compiler

SOURCES = Path(__file__).parent / "src"
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


def built_library() -> Path:
    """Return the path of the library, building it first if this source has no build yet.

    Raises :class:`BuildError`.
    """
    return built("cpu-kernels", "the CPU kernels", SOURCES, FLAGS, _build)


def _build(compiler: str, scratch: Path) -> Path:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    variants = VARIANTS if is_x86 else {"portable": ()}

    def compiled(name: str) -> str | None:
        """Return the object file of a variant; None where the compiler is too old for it."""
        path = f"{scratch}/{name}.o"
        source = ["-c", str(SOURCES / "kernels.cpp"), "-o", path]
        try:
            run_compiler([compiler, *FLAGS, *variants[name], f"-DISA={name}", *source])
        except BuildError:
            if name == "portable":
                raise
            return None
        return path

    with ThreadPoolExecutor() as pool:
        objects = dict(zip(variants, pool.map(compiled, variants), strict=True))
    found = [name for name, path in objects.items() if path is not None]
    library = scratch / "library.so"
    parts = [str(SOURCES / name) for name in ("library.cpp", "pool.cpp")]
    parts += [objects[name] or "" for name in found]
    has = [f"-DHAS_{name}" for name in found]
    run_compiler([compiler, *FLAGS, *has, "-shared", *parts, "-o", str(library)])
    return library
