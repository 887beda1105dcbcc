"""Training does without the packages of the extras, and other systems get a sentence."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moeyard import cli, system
from moeyard.serving import packages

ROOT = Path(__file__).parent.parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

WITHOUT = """
import sys
ABSENT = {"ray", "fastapi", "starlette", "uvicorn", "datasets", "tensorboard", "wandb", "deepspeed"}
ABSENT |= {"PIL"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import moeyard.cli, moeyard.training.trainer, moeyard.training.checkpoints.export
import moeyard.training.report.page, moeyard.training.data.tokenize, moeyard.doctor
print(moeyard.load.__name__)
"""


def test_training_export_report_and_load_import_nothing_of_the_extras():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "load\n"


def test_serve_without_ray_is_one_sentence_with_the_command(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if name == "ray" else real(name)
    )
    assert cli.main(["serve", "model"]) == 2
    assert capsys.readouterr().err == (
        "error: moeyard serve needs packages that are not installed (ray); "
        "pip install 'moeyard[serve]'.\n"
    )


def test_every_extra_that_a_message_names_exists():
    found = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "serving").rglob("*.py")]:
        found |= named_in(path)
    found |= {name for path in (ROOT / "training").rglob("*.py") for name in named_in(path)}
    assert found == {"serve", "datasets", "tensorboard", "wandb", "deepspeed", "images"}
    assert found <= set(EXTRAS)


def named_in(path: Path) -> set[str]:
    parts = path.read_text(encoding="utf-8").split("pip install 'moeyard[")[1:]
    return {part.split("]")[0] for part in parts}


@pytest.mark.parametrize("name", ["win32", "darwin"])
def test_other_systems_get_a_sentence(name, monkeypatch, capsys):
    monkeypatch.setattr(system.sys, "platform", name)
    if name == "win32":
        with pytest.raises(SystemExit, match="2"):
            system.stop_unless_it_can_run()
        assert "error: the system is Windows" in capsys.readouterr().err
    else:
        system.stop_unless_it_can_run()
        assert capsys.readouterr().err.startswith("note: the system is darwin")
