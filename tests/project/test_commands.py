"""The command line: help, quick answers to typos, and the commands that open a model."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeyard.cli import COMMANDS, build_parser, main
from moeyard.errors import ConfigError
from moeyard.training.key_check import check_keys

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "configs" / "train" / "tiny.yaml")

WITHOUT_TORCH = """
import sys
from moeyard.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(status)
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    action = build_parser()._subparsers._group_actions[0]
    return dict(action.choices)


def run_without_torch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", parsers())
def test_help_explains_every_argument_and_shows_its_default(name):
    parser = parsers()[name]
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, f"{name} {action.dest} has no help"
        is_secret = action.dest == "api_key"
        if action.option_strings and action.default not in (None, False, [], "==SUPPRESS=="):
            shown = "MOEYARD_API_KEY" if is_secret else f"default: {action.default}"
            assert shown in text, f"{name} does not show the default of {action.dest}"


def test_the_key_of_the_server_is_not_in_its_help(monkeypatch):
    monkeypatch.setenv("MOEYARD_API_KEY", "a-secret-key")
    assert "a-secret-key" not in parsers()["serve"].format_help()


def test_every_file_of_commands_is_a_command():
    shared = {"__init__", "options", "model_folder", "forecast_table", "speculation"}
    shared |= {"trace_gates", "trace_place", "trace_replay", "trace_predict"}
    files = {path.stem for path in (ROOT / "commands").glob("*.py")} - shared
    assert files == {module.__name__.rpartition(".")[2] for module in COMMANDS}


def test_help_and_typos_are_answered_without_torch():
    done = run_without_torch("serve", "--help")
    assert done.returncode == 0 and "--expert-memory" in done.stdout
    done = run_without_torch("train", TINY, "train.stepz=5")
    assert done.returncode == 2
    assert done.stderr == "error: train.stepz is not a known key; did you mean train.steps?\n"


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["--train.steps", "5"], "--train.steps is not an option; write train.steps=5"),
        (["--train.steps=5"], "write train.steps=5 to set a key."),
        (["model.moe.router={kind:topk,k:2}"], "write a space after the colon: kind: topk."),
        (["--nproc", "0"], "--nproc is 0; use 1 or more."),
    ],
)
def test_slips_of_the_pen_are_told_what_to_write(capsys, given, wanted):
    assert main(["train", TINY, *given]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1


def test_folders_without_a_run_are_refused_in_a_sentence(tmp_path, capsys):
    assert main(["train", str(tmp_path)]) == 2
    assert "has no config.yaml, so no run has started there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["train", str(tmp_path)]) == 2
    assert f"start_from={tmp_path}" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    assert main(["generate", str(tmp_path), "a"]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "exports").exists()


def test_other_commands_refuse_unknown_options():
    with pytest.raises(SystemExit):
        main(["report", "runs/x", "--train.steps", "5"])


@pytest.mark.parametrize(
    "router, problem",
    [
        ({"kind": "topk", "k": 2}, None),
        ({"kind": "hash"}, None),
        ({"kind": "mypkg.routers:Cosine", "anything": 1}, None),
        ({"kind": "hash", "jitter": 0.1}, "model.moe.router.jitter is not a known key"),
        ({"k": 2}, None),  # what is missing, the typed models say
        (5, None),
    ],
)
def test_the_keys_of_a_router_are_those_of_its_kind(router, problem):
    values = {"model": {"moe": {"router": router}}}
    if problem is None:
        check_keys(values)
        return
    with pytest.raises(ConfigError, match=problem):
        check_keys(values)


def test_a_run_is_opened_by_its_folder_and_exported_once(tmp_path, capsys, tiny_run):
    folder = str(tiny_run)
    assert main(["generate", folder, "ab", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    first = capsys.readouterr()
    assert "tokens=4" in first.err
    exported = list((tiny_run / "exports").iterdir())
    assert len(exported) == 1
    before = exported[0].stat().st_mtime_ns
    assert main(["generate", folder, "ab", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == first.out
    assert exported[0].stat().st_mtime_ns == before

    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 40)
    assert main(["eval", folder, "--text", str(text), "--length", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == len(text.read_text()) - 1
    assert found["loss"] == pytest.approx(reference_loss(exported[0], text.read_text(), 7), 1e-5)

    assert main(["eval", folder]) == 2
    assert "give --text FILE or --tasks A,B" in capsys.readouterr().err
    text.write_text("a")
    assert main(["eval", folder, "--text", str(text)]) == 2
    assert "the text has 1 tokens" in capsys.readouterr().err


def reference_loss(folder: Path, text: str, length: int) -> float:
    """Score windows one by one with transformers' own tools."""
    import torch
    from transformers import AutoTokenizer

    import moeyard

    model = moeyard.load(folder)
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor(ids[start : start + length + 1])
        scores = model(window[None, :-1])[0].log_softmax(-1)
        total -= sum(float(scores[row, token]) for row, token in enumerate(window[1:]))
    return total / (len(ids) - 1)


def test_a_conversation_goes_on_until_the_input_ends(monkeypatch, capsys, tiny_run):
    lines = iter(["hello", "/new", "", "hello"])

    def read(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    template = str(ROOT / "configs" / "serve" / "chatml.jinja")
    options = ["--chat-template", template, "--max-new-tokens", "3", "--temperature", "0"]
    assert main(["chat", str(tiny_run), *options]) == 0
    said = capsys.readouterr()
    answers = said.out.splitlines()
    assert said.out.endswith("\n") and answers[: len(answers) // 2] * 2 == answers
    assert said.err.count("the answer ends after 3 tokens") == 2
    lines = iter(["hello", "/new", "", "hello"])
    assert main(["chat", str(tiny_run), *options, "--speculative", "ngram"]) == 0
    assert capsys.readouterr().out == said.out


def test_chats_that_cannot_go_on_say_why(monkeypatch, capsys, tiny_run):
    lines = iter(["x" * 300])

    def read(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(tiny_run)]) == 2
    assert "has no chat template; give one with --chat-template" in capsys.readouterr().err
    template = str(ROOT / "configs" / "serve" / "chatml.jinja")
    assert main(["chat", str(tiny_run), "--chat-template", template]) == 0
    assert "begin again with /new" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A run of one step, trained by the command, with a model of at most 256 tokens."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "corpus.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    settings = {
        "run_dir": folder / "run",
        "data.source": text,
        "train.steps": 1,
        "train.sequence_length": 32,
        "train.batch_sequences": 2,
        "model.max_positions": 256,
        "model.num_layers": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "moeyard.cli", "train", TINY, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"
