"""Editors and type checkers see what a REPL shows: the public names and their types."""

import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import moeyard

ROOT = Path(__file__).parent.parent.parent
LINK = ROOT / ".venv" / "links"

USE = """
import torch
import moeyard
from moeyard import MoELayer, TopK

model = moeyard.load("folder")
reveal_type(model)
reveal_type(model.generate("Once upon"))
reveal_type(model.generate(["a", "b"]))
reveal_type(model.generate(torch.zeros(1, 1)))
reveal_type(MoELayer(8, 4, 2, TopK(k=4)))
reveal_type(TopK(k=4).k)
TopK(k="four")
"""
TYPES = (
    "moeyard.moe.models.language_model.LanguageModel",
    "str",
    "list[str]",
    "torch._tensor.Tensor",
    "moeyard.moe.layer.MoELayer",
    "int",
)


def test_tab_completion_offers_the_public_names():
    assert dir(moeyard) == moeyard.__all__
    namespace: dict = {}
    exec("from moeyard import *", namespace)
    assert namespace.keys() >= set(moeyard.__all__)


@pytest.mark.skipif(not LINK.exists(), reason="the package was not installed by scripts/install")
def test_a_path_file_leads_to_the_package_and_its_files_keep_their_names():
    """Type checkers follow path files, but no import hooks."""
    spec = PathFinder.find_spec("moeyard", [str(LINK)])
    assert spec is not None and Path(spec.origin).resolve() == ROOT / "__init__.py"
    code = "import sys, moeyard.errors as m; print(sys.path, m.__file__, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path, file = run.stdout.splitlines()
    assert str(LINK) in path
    assert file == str(ROOT / "errors.py")


@pytest.mark.slow
def test_mypy_knows_the_types_of_the_public_names(tmp_path):
    """Run where nothing but the installation says where the package is."""
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    notes = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert [note.split('"')[1] for note in notes] == list(TYPES), done.stdout
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and '"TopK" has incompatible type "str"' in errors[0]
