"""``moeyard doctor``: true facts, and a self-check that sees wrong kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moeyard import __version__
from moeyard.cli import main
from moeyard.doctor import PACKAGES
from moeyard.kernels import experts as door
from moeyard.kernels import trust
from moeyard.kernels.checks import experts as self_check
from moeyard.kernels.cpu import library
from moeyard.kernels.torch_ops import experts as torch_backend
from moeyard.kernels.torch_ops import loop as expert_loop


def doctor(capsys, *arguments) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_every_backend_and_type_passes_here(capsys):
    status, text = doctor(capsys, "--json")
    found = json.loads(text)
    assert status == 0 and found["passed"]
    checked = {(c["backend"], c["dtype"]) for c in found["backends"] if c["device"] == "cpu"}
    has_cpp = library.load().functions is not None
    there = ("torch", "reference", "cpp") if has_cpp else ("torch", "reference")
    expected = {(b, d) for b in there for d in ("float32", "bfloat16")}
    if not has_cpp:
        expected.add(("cpp", "any"))
    if not torch.cuda.is_available():
        expected |= {("triton", "any"), ("megablocks", "any")}
    assert checked == expected
    for check in found["backends"]:
        assert check["passed"] == (check["unavailable"] is None)
        if not check["passed"]:
            names = {"triton": "Triton", "megablocks": "MegaBlocks"}
            assert check["unavailable"].startswith(names.get(check["backend"], ""))
            continue
        assert set(check["errors"]) == {"values", "grad x", "grad weights", "grad fc1", "grad fc2"}
        assert all(0 < error <= check["limit"] for error in check["errors"].values())
    assert found["torch"]["torch"] == torch.__version__
    assert found["torch"]["c++ kernels"] == library.load().state
    assert found["torch"]["moeyard"].startswith(__version__)
    assert found["machine"]["cores usable"].startswith(f"{len(os.sched_getaffinity(0))} of")
    assert set(found["packages"]) == set(PACKAGES)


def test_tables_are_aligned_and_say_passed(capsys):
    status, text = doctor(capsys)
    head, *rows = text[text.index("  backend ") :].splitlines()
    assert status == 0 and len(rows) >= 4
    places = [head.index(name) for name in ("device", "type", "values", "grad fc2", "limit")]
    for row in rows:
        assert row.endswith("passed") or "  not available: " in row
        assert all(row[place - 1] == " " and row[place] != " " for place in places), row


@pytest.mark.parametrize("part", ["values", "grad fc1"])
def test_a_wrong_kernel_fails_the_check_and_the_command(capsys, monkeypatch, part):
    if part == "values":
        right = torch_backend.combine_rows
        monkeypatch.setattr(torch_backend, "combine_rows", lambda *a: right(*a) * 1.1)
    else:
        add = expert_loop._add_product
        monkeypatch.setattr(
            expert_loop, "_add_product", lambda total, g, *a: add(total, g * 1.1, *a)
        )
    status, text = doctor(capsys, "--json")
    assert status == 1
    for check in json.loads(text)["backends"]:
        if check["unavailable"] is not None:
            continue
        assert check["passed"] == (check["backend"] != "torch")
        assert (check["errors"][part] > check["limit"]) == (check["backend"] == "torch")
    status, text = doctor(capsys)
    assert status == 1 and text.count("FAILED") == 2


def test_cpp_kernels_that_compute_wrong_fail_the_command_and_a_missing_compiler_does_not(
    capsys, monkeypatch
):
    wrong = library.Library(None, "avx2 computes norms in float32 wrong", is_wrong=True)
    monkeypatch.setattr(trust, "cpp", lambda: wrong)
    monkeypatch.setattr(door, "cpp_library", lambda: wrong)
    status, text = doctor(capsys)
    assert status == 1 and "FAILED avx2 computes norms in float32 wrong" in text
    monkeypatch.undo()
    monkeypatch.setattr(library, "_loaded", library.Library(None, "no C++ compiler"))
    status, text = doctor(capsys)
    assert status == 0 and "not available: no C++ compiler." in text


def test_a_kernel_that_breaks_or_gives_nan_is_a_line_of_the_table(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(torch_backend, "combine_rows", broken)
    status, text = doctor(capsys)
    assert status == 1 and text.count("FAILED RuntimeError: no kernel image") == 2
    monkeypatch.setattr(torch_backend, "combine_rows", lambda y_RD, *_: y_RD[:61] * torch.nan)
    check = self_check.check_backend("torch", torch_backend.run, torch.float32, "cpu")
    assert not check.passed and check.problem == "values is not finite"


def test_optional_packages_are_looked_up_and_never_imported(tmp_path):
    """A package whose import would end the process is reported by its version."""
    for name, is_whole in (("deepspeed", True), ("megablocks", False)):
        metadata = tmp_path / f"{name}-9.8.7.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8.7\n")
        if is_whole:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("import os\nos._exit(7)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "moeyard.cli", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    packages = json.loads(done.stdout)["packages"]
    assert packages["deepspeed"] == "9.8.7"
    assert packages["megablocks"] == "9.8.7, but its module is missing; install it again"
