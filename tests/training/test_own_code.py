"""A router of a user's own package: trained, resumed, exported, loaded and served by permission.

No configuration and no folder permits itself.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, MoeyardError
from moeyard.moe.folders.convert import convert
from moeyard.moe.routers import own_code
from moeyard.moe.routers.own_code import allow
from moeyard.serving.app import build
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model
from moeyard.training.read_config import read_run_config

from http_calls import call
from launch import run

COSINE = Path(__file__).parent.parent / "moe" / "cosine_router.py"
KIND = "trialpkg.routers:Cosine"
ALLOW = ("--allow-code", "trialpkg.routers")
BROKEN = """
import moeyard
class WithoutBuild(moeyard.RouterConfig): pass
class Taken(moeyard.RouterConfig):
    kind: str = "hash"
    def build(self, sizes): return None
NOT_A_ROUTER = 3
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with a package of two modules, and one that cannot be imported."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "trialpkg").mkdir()
    (folder / "trialpkg/__init__.py").touch()
    shutil.copy(COSINE, folder / "trialpkg/routers.py")
    (folder / "trialpkg/broken.py").write_text(BROKEN)
    (folder / "trialpkg/raises.py").write_text("raise RuntimeError('no luck')")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_permitted(monkeypatch, package):
    """Begin each test as a new process does; the package can be imported."""
    monkeypatch.setattr(own_code, "_permitted", {})
    monkeypatch.syspath_prepend(str(package))


@pytest.fixture(scope="module")
def config(tmp_path_factory, config_file) -> Path:
    """The small configuration with a router of the package."""
    values = yaml.safe_load(config_file.read_text())
    values["model"]["moe"]["router"] = {"kind": KIND, "k": 2, "confidence_loss": 0.1}
    path = tmp_path_factory.mktemp("own") / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, package, config) -> Path:
    """A run of two steps that was resumed for a third."""
    folder = tmp_path_factory.mktemp("run") / "run"
    command = [sys.executable, "-m", "moeyard.training", str(config), *ALLOW]
    for steps in (2, 3):
        options = [f"run_dir={folder}", f"train.steps={steps}", "checkpoint.every=1"]
        output = run([*command, *options], 120, PYTHONPATH=str(package))
    assert "step=3/3" in output and "step=1/" not in output, output
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, package, run_dir) -> Path:
    """The export of the run."""
    target = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_code, "_permitted", {})
        patch.syspath_prepend(str(package))
        assert main(["export", str(run_dir), str(target), *ALLOW]) == 0
    return target


def test_a_run_is_trained_resumed_exported_loaded_and_continues_a_prompt(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "moeyard" and values["moeyard"]["moe"]["router"]["kind"] == KIND
    assert "Cosine, where qwen3_moe has topk" in values["why_moeyard"]
    model = moeyard.load(folder, allow_code=("trialpkg.routers",))
    gates = model.decoder.routers()
    assert all(type(gate).__module__ == "trialpkg.routers" for gate in gates)
    moved = sorted({abs(round(float(bias), 4)) for gate in gates for bias in gate.balance_E})
    assert moved[-1] in (0.01, 0.02, 0.03)  # after_step ran, and its buffer came along
    ids = torch.tensor([list(b"def f")])
    found = model.generate(ids, max_new_tokens=6, temperature=0)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(found, expected)


def test_it_is_served_with_the_same_tokens(folder):
    model = moeyard.load(folder, allow_code="trialpkg.routers")
    own_code._permitted.clear()
    server = Server(ServeArgs(model=str(folder), allow_code="trialpkg.routers"))
    try:
        body = {"model": "model", "prompt": "def f", "max_tokens": 6, "temperature": 0}
        answer = call(server, "POST", "/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        ids = torch.tensor([list(b"def f")])
        tokens = model.generate(ids, max_new_tokens=6, temperature=0)[0, 5:].tolist()
        text = answer.json()["choices"][0]["text"]
        assert text == bytes(token for token in tokens if token < 256).decode(errors="replace")
    finally:
        server.close()


def test_every_replica_is_told_what_is_permitted(folder):
    """As ``serve run moeyard.serving.app:build model=... allow_code=...`` tells it."""
    deployment = build({"model": str(folder), "allow_code": "trialpkg.routers"})._bound_deployment
    (args,) = deployment.init_args
    assert args.allow_code == ["trialpkg.routers"]


def test_moeyard_serve_hands_the_modules_on(monkeypatch, folder):
    seen = []
    monkeypatch.setattr("moeyard.serving.cluster.guardian.run_guarded", lambda start: start(1))
    monkeypatch.setattr(
        "moeyard.serving.launch.serve_forever", lambda args, *_: seen.append(args) or 0
    )
    assert main(["serve", str(folder), *ALLOW, "--allow-code", "trialpkg.broken"]) == 0
    assert seen[0].allow_code == ["trialpkg.routers", "trialpkg.broken"]


NOT_PERMITTED = (
    r"router\.kind is 'trialpkg.routers:Cosine', a class of code that you have not permitted; "
    r"if you trust it, add --allow-code trialpkg.routers \(in Python: "
    r"allow_code='trialpkg.routers'\)\.?$"
)


@pytest.mark.parametrize("what", ["load", "serve", "export", "train", "start_from", "convert"])
def test_nothing_permits_itself(folder, run_dir, config, tmp_path, what, capsys):
    sys.modules.pop("trialpkg.routers", None)
    with pytest.raises(MoeyardError, match=NOT_PERMITTED) as caught:
        if what == "load":
            moeyard.load(folder)
        elif what == "serve":
            check_model(ServeArgs(model=str(folder)))
        elif what == "train":
            read_run_config(config)
        elif what == "start_from":
            start = tmp_path / "start.yaml"
            values = {"run_dir": "unused", "start_from": str(folder), "train": {"steps": 1}}
            start.write_text(yaml.safe_dump(values))
            read_run_config(start)
        elif what == "convert":
            convert(folder, tmp_path / "out")
        else:
            assert main(["export", str(run_dir), str(tmp_path / "out")]) == 2
            raise ConfigError(capsys.readouterr().err.removeprefix("error: ").strip())
    assert "\n" not in str(caught.value)
    assert "trialpkg.routers" not in sys.modules, "it was imported all the same"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nowhere.at_all", r"cannot be imported \(No module named 'nowhere'\); install it, or put"),
        ("trialpkg.raises", r"fails while it is imported \(RuntimeError: no luck\); correct"),
        ("trialpkg.routers:Cosine", "is not the name of a module; use one such as"),
        ("", "is not the name of a module"),
    ],
)
def test_a_module_that_cannot_be_imported_gets_one_sentence(module, message):
    with pytest.raises(ConfigError, match=message):
        allow([module])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("trialpkg.broken:Nothing", "but trialpkg.broken has no 'Nothing'; name one of its"),
        ("trialpkg.broken:", "but trialpkg.broken has no ''"),
        ("trialpkg.broken:NOT_A_ROUTER", "is not a subclass of moeyard.RouterConfig"),
        ("trialpkg.broken:WithoutBuild", r"has no build\(self, sizes\); define it"),
        ("trialpkg.broken:Taken", "calls itself 'hash', but short names are for moeyard's own"),
    ],
)
def test_a_class_that_cannot_be_a_router_gets_one_sentence(config, kind, message):
    allow("trialpkg.broken")
    with pytest.raises(ConfigError, match=f"^model.moe.router: .*{message}"):
        read_run_config(config, [f"model.moe.router={{kind: '{kind}'}}"])


def test_its_fields_are_validated_as_ours_are(config):
    allow("trialpkg.routers")
    with pytest.raises(ConfigError, match=r"^model.moe.router.width: it is 'x'"):
        read_run_config(config, ["model.moe.router.width=x"])
    with pytest.raises(ConfigError, match=r"^model.moe.router.heigth is not a known key"):
        read_run_config(config, ["model.moe.router.heigth=2"])
    with pytest.raises(ConfigError, match=r"router.k is 9, but the layer has 4 experts"):
        read_run_config(config, ["model.moe.router.k=9"])


def test_an_unknown_kind_in_a_folder_names_the_known_ones(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace(KIND, "magic"))
    with pytest.raises(MoeyardError, match=r"router\.kind is 'magic'; use one of 'topk', 'hash'"):
        moeyard.load(tmp_path / "m")
