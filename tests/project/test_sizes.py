"""Files and functions that fit in a head, and deliberate defects that still have their line."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("kernels", "moe", "parallel", "training", "serving", "commands")
LONGEST_FILE, LONGEST_FUNCTION = 250, 60
TABLES = {"kernels/cpu/structures.py"}
"""Files of data, a line each."""
TRITON = ("kernels", "gpu")
"""Triton kernels and their launchers name an argument a line, so functions there may be longer."""


def sources() -> list[Path]:
    suffixes = {".py", ".h", ".cpp"}
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path for path in [*inside, *ROOT.glob("*.py")] if path.suffix in suffixes]


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources()
    }
    long = {name for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert not long - TABLES, f"more than {LONGEST_FILE} lines: {sorted(long - TABLES)}"


def test_no_function_is_longer_than_a_screen():
    for path in sources():
        if path.suffix != ".py" or path.relative_to(ROOT).parts[:2] == TRITON:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("mutations").MUTATIONS


def test_every_deliberate_defect_has_a_line_to_break(mutations):
    for name, file, line, _, _ in mutations:
        assert line in (ROOT / file).read_text(encoding="utf-8"), f"{name}: {file} lost {line!r}"
