"""A model is named as on the hub: downloaded whole, once, or refused with one sentence."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants

import moeyard
from moeyard.errors import ConfigError, DataError, ModelFileError
from moeyard.moe.folders.hub import hub_name, local_folder, pinned

NAME = "some-lab/small.model"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path, model_folder, monkeypatch):
    """Offer the small model with things that must not be downloaded."""
    folder = tmp_path / "offered"
    shutil.copytree(model_folder, folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    with FakeHub({NAME: folder}) as hub:
        for key, value in _environment(hub, tmp_path).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.chdir(tmp_path)
        yield hub


def _environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    names = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    return {**names, "HF_HUB_DISABLE_XET": "1"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_model_is_downloaded_once_without_pickles_and_without_other_formats(hub, model_folder):
    folder = local_folder(NAME)
    assert files_of(folder) == files_of(model_folder)
    assert local_folder(NAME) == folder
    assert max(hub.served.values()) == 1
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(moeyard.load(NAME)(ids), moeyard.load(model_folder)(ids))


def test_a_tokenizer_comes_without_weights(hub):
    assert "tokenizer.json" in files_of(local_folder(NAME, weights=False))
    assert hub.served[WEIGHTS] == 0


def test_a_broken_connection_is_taken_up_again_where_it_broke(hub, model_folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts[WEIGHTS] = 5000
    assert files_of(local_folder(NAME)) == files_of(model_folder)
    assert hub.ranges == [f"{WEIGHTS} from 5000"]


def test_after_a_failure_only_what_is_missing_is_downloaded_again(hub, model_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    hub.cuts[WEIGHTS], hub.times_cut = 1000, 100
    with pytest.raises(ModelFileError, match=r"the download of .* broke off .*whole stay.*hf down"):
        local_folder(NAME)
    hub.cuts.clear()
    before = dict(hub.served)
    assert files_of(local_folder(NAME)) == files_of(model_folder)
    assert {name for name in hub.served if hub.served[name] > before.get(name, 0)} == {WEIGHTS}


def test_a_commit_names_the_same_files_and_needs_no_network_again(hub):
    name = pinned(NAME)
    assert name == f"{NAME}@{COMMIT}"
    folder = local_folder(name)
    hub.folders.clear()
    assert local_folder(name) == folder
    assert pinned(name) == name
    with pytest.raises(ModelFileError, match="has no revision 'other'; give a branch"):
        hub.folders[NAME] = folder
        local_folder(f"{NAME}@other")


def test_without_network_a_downloaded_model_opens_and_another_says_how_to_get_it(hub, monkeypatch):
    folder = local_folder(NAME)
    hub.__exit__()
    assert local_folder(NAME) == folder
    with pytest.raises(
        ModelFileError, match=r"does not answer .*hf download lab/other --local-dir"
    ):
        local_folder("lab/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_folder(NAME) == folder
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE is set; unset it, or run"):
        local_folder("lab/other")


def test_gated_unknown_and_useless_models_get_a_sentence(hub, tmp_path):
    with pytest.raises(ModelFileError, match=r"no folder here and no model on .* you may see"):
        local_folder("lab/unknown")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.folders["lab/bare"] = tmp_path / "bare"
    with pytest.raises(ModelFileError, match="lab/bare has no safetensors on"):
        local_folder("lab/bare")
    hub.gated.add(NAME)
    with pytest.raises(ModelFileError, match=r"is gated; accept its terms at .*small.model, then"):
        local_folder(NAME)


def test_a_full_disk_is_named_with_the_place(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(ModelFileError, match=r"does not fit into .*hub \(No space left.*HF_HOME"):
        local_folder(NAME)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_is_named_and_the_rest_comes_later(hub, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "size=64k"
    command = ["mount", "-t", "tmpfs", "-o", size, "none", str(disk)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this machine mounts no small disks")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk))
        with pytest.raises(ModelFileError, match=rf"does not fit into {disk} \(No space left"):
            local_folder(NAME)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert local_folder(NAME).is_dir()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_error_of_any_library_gets_a_sentence(hub, monkeypatch):
    for text, sentence in (("odd", r"broke off \(odd\)"), ("No space left on device", "HF_HOME")):

        def fails(*_, text=text, **__):
            raise RuntimeError(text)

        monkeypatch.setattr(huggingface_hub.file_download, "http_get", fails)
        with pytest.raises(ModelFileError, match=sentence):
            local_folder(NAME)
    with pytest.raises(ModelFileError, match="lab/a--b is no folder here and no name that a hub"):
        local_folder("lab/a--b")


def test_two_processes_download_each_file_once(hub, tmp_path):
    code = "import sys; from moeyard.moe.folders.hub import pinned; print(pinned(sys.argv[1]))"
    environment = {**os.environ, **_environment(hub, tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, NAME], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert {process.communicate()[0].strip() for process in running} == {f"{NAME}@{COMMIT}"}
    assert max(hub.served.values()) == 1


def test_folders_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "lab" / "model").mkdir(parents=True)
    for path in ("runs/typo", "lab/model", "./a/b", "/a/b", "a/b/c", "name", "../a", Path("a")):
        assert hub_name(path) is None
    assert hub_name("Qwen/Qwen3-30B-A3B") == ("Qwen/Qwen3-30B-A3B", None)
    assert hub_name("Qwen/Qwen3-30B-A3B@v1.0") == ("Qwen/Qwen3-30B-A3B", "v1.0")


def test_a_run_keeps_the_commits_of_its_model_and_its_tokenizer(hub, config_file):
    from moeyard.training.data.tokenizer import open_tokenizer
    from moeyard.training.read_config import read_run_config

    config = read_run_config(config_file, [f"data.tokenizer={NAME}"])
    assert config.data.tokenizer == f"{NAME}@{COMMIT}"
    assert open_tokenizer(config.data.tokenizer).vocab_size == 257
    assert hub.served[WEIGHTS] == 0
    overrides = [f"start_from={NAME}", "data.tokenizer=null", "model={}"]
    config = read_run_config(config_file, overrides)
    assert config.start_from == config.data.tokenizer == f"{NAME}@{COMMIT}"
    assert config.model.d_model == moeyard.load(NAME).config.d_model
    with pytest.raises(ConfigError, match="start_from is 'lab/x', which cannot be used: lab/x is"):
        read_run_config(config_file, ["start_from=lab/x"])
    with pytest.raises(
        ConfigError, match=r"data.tokenizer is 'lab/x', which cannot be used: lab/x"
    ):
        read_run_config(config_file, ["data.tokenizer=lab/x"])
    with pytest.raises(DataError, match=r"data.tokenizer is 'lab/x'"):
        open_tokenizer("lab/x")


def test_convert_and_a_server_take_names(hub, tmp_path, model_folder):
    from moeyard.cli import main
    from moeyard.serving.serve_args import ServeArgs
    from moeyard.serving.server import check_model, with_commit

    assert main(["convert", NAME, str(tmp_path / "out")]) == 0
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(moeyard.load(tmp_path / "out")(ids), moeyard.load(model_folder)(ids))
    args = with_commit(ServeArgs(model=NAME))
    assert (args.model, args.model_name) == (f"{NAME}@{COMMIT}", NAME)
    check_model(args)
