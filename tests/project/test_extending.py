"""The page about extensions tells the truth: its code runs, and a router is one file and a line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import moeyard

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

INSIDE = """
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.layer import MoELayer
import torch
values = {"num_experts": 4, "d_expert": 16, "router": {"kind": "nearest", "k": 2}}
config = MoEConfig.model_validate(values)
y, routing = MoELayer(32, 16, 4, config.router)(torch.randn(5, 32))
assert int(routing.counts_E.sum()) == 10
print(config.model_dump()["router"])
"""


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, model_folder, config_file):
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copyfile(config_file, tmp_path / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), found)
    assert found["routing"].experts_TK.shape == (5, 2)
    plain = moeyard.load("model").generate(
        found["torch"].tensor([[1, 2, 3]]), max_new_tokens=4, temperature=0
    )
    assert found["ids_BT"].equal(plain), "a policy may not change an answer"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert found["layer"].path.rows == 14


def test_a_router_for_everyone_is_one_file_and_one_line_of_a_table(tmp_path):
    """In a copy of the package, with the classes of the page in a new file of moe/routers."""
    copy = tmp_path / "moeyard"
    folders = ("kernels", "moe", "parallel", "training", "serving")
    copy.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / folder for folder in folders)]:
        (copy / path.name).symlink_to(path)
    (copy / "moe").unlink()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "moe", copy / "moe", ignore=ignored)

    classes = BLOCKS[0][BLOCKS[0].index("class Nearest") : BLOCKS[0].index("layer = ")]
    names = "from .router import Router, RouterConfig, RouterInput, RouterSizes, Routing\n"
    named = 'k: int = 2\n    kind: Literal["nearest"] = "nearest"\n\n    def build('
    text = classes.replace("moeyard.", "").replace("def build(", named, 1)
    head = f"from typing import Literal\n\nimport torch\n\n{names}\n\n"
    (copy / "moe/routers/nearest.py").write_text(head + text)
    table = (copy / "moe/routers/table.py").read_text()
    table = table.replace("from .own_code", "from .nearest import Nearest\nfrom .own_code")
    (copy / "moe/routers/table.py").write_text(
        table.replace("    Hash,\n", "    Hash,\n    Nearest,\n")
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}){INSIDE}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'kind': 'nearest', 'k': 2}"


def test_every_path_that_the_pages_name_is_there():
    examples = {"moe/routers/nearest.py", "tests/moe/test_nearest.py"}
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        home = ROOT / "tests" if page.name == "promises.md" else ROOT
        for path in re.findall(
            r"`((?:kernels|moe|parallel|training|serving|tests)/[\w/.]+)`", text
        ):
            is_there = (home / path).exists() or (ROOT / path).exists() or path in examples
            assert is_there, f"{page.name} names {path}, which is not there"
        for link in re.findall(r"\]\(([\w/.-]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
