"""The layout: what is exported, what is packaged, what is never imported."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import moeyard
from moeyard.moe.routers.table import ROUTERS

ROOT = Path(__file__).parent.parent.parent
FLOORS = {
    "kernels": 1,
    "moe": 2,
    "chat_templates": 3,
    "parallel": 3,
    "training": 4,
    "serving": 4,
    "commands": 5,
}
FOLDERS = tuple(FLOORS)
PYTHON_FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {".venv", "build", "runs"}.intersection(path.relative_to(ROOT).parts)
]


def test_exported_names_are_pinned():
    assert moeyard.__all__ == sorted(moeyard.__all__)
    assert set(moeyard.__all__) == {
        "Forecast",
        "Forecaster",
        "GlobalCounts",
        "Hash",
        "LanguageModel",
        "LayerLosses",
        "Lookahead",
        "MoELayer",
        "MoeyardError",
        "Recommender",
        "Router",
        "RouterConfig",
        "RouterInput",
        "RouterSizes",
        "Routing",
        "SoftMoE",
        "TextClassifier",
        "TextWriter",
        "TopK",
        "Upscaler",
        "VisionModel",
        "__version__",
        "after_step",
        "auxiliary_loss",
        "load",
        "load_classifier",
        "load_forecaster",
        "load_recommender",
        "load_seq2seq",
        "load_upscaler",
        "load_vision",
        "replace_moe_blocks",
        "router",
    }
    assert all(hasattr(moeyard, name) for name in moeyard.__all__)


def test_kernels_is_a_namespace_and_no_test_folder_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


IMPORT_EVERYTHING = """
import importlib.util, os, sys
spec = importlib.util.find_spec("kernels")
# Nothing, our folder as a namespace, or Hugging Face's package: never a module of ours.
assert spec is None or spec.origin is None or not spec.origin.startswith(ROOT), spec
import moeyard, moeyard.kernels.values.grouping, moeyard.training.trainer
import moeyard.serving.engine.engine
from transformers import AutoTokenizer, Qwen3MoeForCausalLM
loaded = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
files = [os.path.realpath(file) for file in loaded]
twice = {f for f in files if files.count(f) > 1 and f.startswith(ROOT) and "site-packages" not in f}
assert not twice, twice
print("fine")
"""


@pytest.mark.parametrize(
    "hub_package",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["without_kernels", "with_kernels"],
)
def test_transformers_imports_beside_us_from_the_root(tmp_path, hub_package):
    """From the root ``python -c`` finds our folders as bare names; that must do no harm."""
    path = [str(tmp_path / "packages")] if hub_package else []
    if hub_package:  # what transformers looks for: an importable package with metadata in range
        package = tmp_path / "packages" / "kernels"
        package.mkdir(parents=True)
        names = "CUDAProperties Device LayerRepository Mode get_kernel register_kernel_mapping"
        names += " replace_kernel_forward_from_hub use_kernel_forward_from_hub kernelize"
        names += " LocalLayerRepository FuncRepository use_kernel_func_from_hub"
        stubs = "".join(f"class {name}:\n    pass\n" for name in names.split())
        (package / "__init__.py").write_text(f"# stand-in for the hub's package\n{stubs}")
    code = f"ROOT = {str(ROOT)!r}\n{IMPORT_EVERYTHING}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_and_nothing_dangerous_is_called(path):
    relative = path.relative_to(ROOT)
    floor = FLOORS.get(relative.parts[0])
    if relative == Path("training/__main__.py"):  # a program puts the parts together
        floor = max(FLOORS.values())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and floor is not None and node.level >= 2:
            module = (node.module or "").split(".")[0]
            above = node.level - len(relative.parts) == 0
            if above and module in FLOORS and module != relative.parts[0]:
                assert FLOORS[module] < floor, f"{relative} imports {module}"
        if isinstance(node, ast.Import | ast.ImportFrom) and relative.parts[0] in FOLDERS:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            if isinstance(node, ast.Import) or node.level == 0:
                bare = {(name or "").split(".")[0] for name in names}
                assert not bare & {*FOLDERS, "moeyard"}, f"{relative} imports {bare}"
                allowed = relative == Path("training/checkpoints/dcp_reader.py")
                assert allowed or not bare & {"pickle", "cloudpickle", "marshal", "shelve"}
        if isinstance(node, ast.Call) and relative.parts[0] in FOLDERS:
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "yaml.load", "pickle.load"}
            trusting = [k for k in node.keywords if k.arg == "trust_remote_code"]
            assert all(isinstance(k.value, ast.Constant) and not k.value.value for k in trusting)


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path):
    # From a copy: building in place would leave a build folder whose old files come back.
    source = tmp_path / "source"
    aside = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=aside)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"moeyard/py.typed", "moeyard/training/schema.json"}
    expected |= {f"moeyard/{p.name}" for p in ROOT.glob("*.py")}
    for folder in FOLDERS:
        expected |= {
            f"moeyard/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / folder).rglob("*.py")
        }
    with_sources = ("kernels/cpu/src", "serving/experts/reading/native/src")
    sources = (path for folder in with_sources for path in (ROOT / folder).iterdir())
    assert inside == expected | {f"moeyard/{p.relative_to(ROOT).as_posix()}" for p in sources}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in expected}
    assert set(listed) == folders


def test_every_shipped_configuration_is_valid(model_folder):
    """Those that start from a folder start from the one the README's first run exports, or from a
    dense one."""
    from moeyard.configuration import read_values
    from moeyard.training.key_check import check_keys
    from moeyard.training.read_config import read_run_config

    configurations = list((ROOT / "configs" / "train").glob("*.yaml"))
    assert len(configurations) >= 3
    for path in configurations:
        text = path.read_text()
        starts = re.search(r"^start_from: runs/(tiny|chat)-model$", text, re.MULTILINE) is not None
        # The README's run takes 1024 tokens, the tests' folder fewer.
        changed = [f"start_from={model_folder}", "model={max_positions: 1024}"] if starts else []
        if "start_from: runs/dense-model\n" in text:
            dense = "{d_model: 32, num_layers: 2, num_heads: 4, d_ff: 40}"
            changed = ["start_from=null", f"model={dense}"]
        check_keys(read_values(path, changed))
        read_run_config(path, changed)


def test_page_and_schema_of_the_configuration_are_up_to_date():
    script = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))
    schema = (ROOT / "training" / "schema.json").read_text(encoding="utf-8")
    assert schema == script["schema"](), "run .venv/bin/python scripts/config_reference.py"
    written = script["page"]()
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == written, "run .venv/bin/python scripts/config_reference.py"
    assert "|  |" not in page, "a key has no docstring"
    for router in ROUTERS:
        assert f"with `kind: {router.model_fields['kind'].default}`" in page


def test_the_index_of_the_docs_names_every_page():
    docs = ROOT / "docs"
    index = (docs / "README.md").read_text(encoding="utf-8")
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_the_page_of_serving_names_every_flag_and_parameter():
    from moeyard.cli import build_parser
    from moeyard.serving.api.chat import ChatRequest
    from moeyard.serving.api.completions import CompletionRequest
    from moeyard.serving.api.protocol import IGNORED, StreamOptions

    page = (ROOT / "docs" / "serving.md").read_text()
    serve = build_parser()._subparsers._group_actions[0].choices["serve"]
    flags = {action.option_strings[0] for action in serve._actions if action.option_strings}
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    wanted = {*(flags - {"-h"}), *fields, *StreamOptions.model_fields, *IGNORED}
    assert {name for name in wanted if f"`{name}`" not in page} == set()
