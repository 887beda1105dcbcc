"""Building and loading the C++ kernels, and running without them."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moeyard import cpp_libraries
from moeyard.cpp_libraries import BuildError
from moeyard.kernels import trust
from moeyard.kernels.cpu import build, library
from moeyard.kernels.cpu.build import built_library
from moeyard.kernels.cpu.linear import linear

HAS_KERNELS = library.load().functions is not None
needs_compiler = pytest.mark.skipif(not HAS_KERNELS, reason=library.load().state)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", None)
    return tmp_path / "moeyard"


def test_the_kernels_of_this_machine_compute_right():
    assert not trust.cpp().is_wrong, trust.cpp().state


def fake_compiler(tmp_path, monkeypatch, script: str) -> Path:
    """Install a fake compiler that counts its calls; return the file with the count."""
    compiler, calls = tmp_path / "fake-c++", tmp_path / "calls"
    compiler.write_text(f"#!/bin/sh\necho called >> {calls}\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_libraries, "COMPILERS", (str(compiler),))
    return calls


def test_without_a_compiler_everything_runs_on_torch_and_says_why(cache, monkeypatch, caplog):
    monkeypatch.setattr(cpp_libraries, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING):
        assert library.load().functions is None
    assert "no C++ compiler: none of no-such-compiler is installed" in caplog.text
    with torch.no_grad():
        assert linear(torch.ones(1, 2), torch.ones(3, 2)) is None


def test_a_compiler_that_fails_is_quoted(cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "echo 'x.h:1: error: no such thing' >&2; exit 1")
    with pytest.raises(BuildError, match=r"ended with 1: x\.h:1: error: no such thing"):
        built_library()
    assert not [path for path in cache.iterdir() if path.name != "lock"]


def test_many_at_once_build_once(cache, tmp_path, monkeypatch):
    script = 'while [ "$1" != -o ]; do shift; done; sleep 0.1; touch "$2"'
    calls = fake_compiler(tmp_path, monkeypatch, script)
    with ThreadPoolExecutor() as pool:
        paths = {future.result() for future in [pool.submit(built_library) for _ in range(4)]}
    assert len(paths) == 1 and paths.pop().exists()
    assert calls.read_text().count("called") <= len(build.VARIANTS) + 1


def test_a_folder_that_others_may_write_to_is_refused(cache):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(BuildError, match=r"other users may write to .*; delete it"):
        built_library()


def test_without_a_home_folder_the_reason_is_said(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BuildError, match="no home folder to keep them in; set XDG_CACHE_HOME"):
        built_library()


def test_a_check_that_breaks_leaves_the_kernels_unused(monkeypatch):
    def broken():
        raise RuntimeError("no memory")

    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr("moeyard.kernels.checks.cpu.problem", broken)
    monkeypatch.setattr(library, "_open", lambda: library.Library(object(), "avx2"))
    for _ in range(2):
        found = trust.cpp()
        assert found.functions is None and found.is_wrong
        assert found.state == "avx2 could not be checked (RuntimeError: no memory)"


@needs_compiler
def test_the_pool_runs_every_task_of_every_job_exactly_once(tmp_path):
    """Millions of short jobs of changing size: a worker that is late must not find a task."""
    program = tmp_path / "pool_stress"
    compiler = next(filter(None, map(shutil.which, cpp_libraries.COMPILERS)))
    files = [str(Path(__file__).with_name("pool_stress.cpp")), str(build.SOURCES / "pool.cpp")]
    flags = ["-std=c++20", "-O2", "-pthread", f"-I{build.SOURCES}"]
    subprocess.run([compiler, *flags, *files, "-o", str(program)], check=True)
    done = subprocess.run([str(program), "2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_a_library_that_computes_wrong_is_not_used(cache, monkeypatch):
    monkeypatch.setattr("moeyard.kernels.checks.cpu.problem", lambda: "computes norms wrong")
    monkeypatch.setattr(library, "_open", lambda: library.Library(object(), "avx2"))
    assert trust.cpp() == (None, "avx2 computes norms wrong", True)


def start(code: str, **variables: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PRINT_STATE = "from moeyard.kernels.trust import cpp; print(cpp().state)"


@needs_compiler
@pytest.mark.parametrize("limit", ["portable", "off", "mmx"])
def test_the_environment_limits_the_instruction_set(limit):
    said = start(PRINT_STATE, MOEYARD_CPU_KERNELS=limit)
    expected = {
        "portable": "portable\n",
        "off": "switched off by MOEYARD_CPU_KERNELS=off\n",
        "mmx": "MOEYARD_CPU_KERNELS is 'mmx'; use off or one of portable, avx2",
    }
    assert expected[limit] in said
