"""The page about Python tells the truth: its code runs."""

import inspect
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from moeyard.moe.models.language_model import LanguageModel

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, model_folder, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), found)
    assert isinstance(found["text"], str) and len(found["texts"]) == 2
    assert torch.equal(found["longer_BT"][:, :6], found["ids_BT"])
    assert len(found["layers"]) == 2
    assert all(block.moe.gate.weight.grad.any() for block in found["blocks"])
    printed = capsys.readouterr().out
    assert "2 blocks replaced" in printed and "LanguageModel(" in printed
    names = load_file(tmp_path / "trained" / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names


def test_the_page_names_every_argument_of_generate():
    names = set(inspect.signature(LanguageModel.generate).parameters)
    for name in names - {"self", "prompt", "attention_mask"}:
        assert f"| `{name}` |" in PAGE
