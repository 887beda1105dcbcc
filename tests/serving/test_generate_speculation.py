"""``generate`` with guesses of next tokens say what they say without."""

import pytest
import torch
from drafters import KINDS, use_told
from test_confinement import short_of_memory

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, ExpertReadError
from moeyard.kernels.cpu import library
from moeyard.moe.drafts.tally import DraftCounts
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.models.draft_rows import check_rows, open_speculation
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model
from moeyard.serving.speculating import speculate

from adapter_folders import everything, write_adapter
from small_model import CONFIG
from test_engine import prompts

GREEDY = {"temperature": 0}
HOT = {"temperature": 1.0, "top_p": 0.95, "seed": 4}


def answers(model, options, adapter=None, rows=None, tokens=20):
    """Return the new ids of some prompts that run together, of different lengths."""
    rows = rows or prompts(3)
    longest = max(map(len, rows))
    padded = [[0] * (longest - len(row)) + list(row) for row in rows]
    is_real = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    ids_BT, mask_BT = torch.tensor(padded), torch.tensor(is_real)
    found_BT = model.generate(ids_BT, tokens, attention_mask=mask_BT, adapter=adapter, **options)
    return {tuple(row): ids[longest:].tolist() for row, ids in zip(rows, found_BT, strict=True)}


def check(monkeypatch, kind, model, options, **more) -> DraftCounts:
    """Compare answers with a drafter's guesses to those without."""
    speculate(model, "none", 16)
    expected = answers(model, options, **more)
    use_told(monkeypatch, kind, expected)
    counts = speculate(model, "told", 16)
    assert answers(model, options, **more) == expected
    assert counts.drafted > 10
    assert (counts.accepted == 0) == (kind == "wrong")
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", [GREEDY, HOT], ids=["greedy", "drawn"])
def test_answers_of_prompts_that_run_together_are_those_without(
    model_folder, monkeypatch, dtype, kind, options
):
    model, _ = open_model(model_folder, dtype)
    check(monkeypatch, kind, model, options)


@pytest.mark.parametrize("options", [GREEDY, HOT], ids=["greedy", "drawn"])
def test_answers_of_offloaded_experts_and_an_adapter_are_those_without(
    model_folder, tmp_path, monkeypatch, options
):
    folder = write_adapter(tmp_path / "a", everything(CONFIG))
    model, store = open_model(model_folder, "bfloat16", expert_memory="25%")
    model.adapters.load("a", folder)
    check(monkeypatch, "mixed", model, options, adapter="a")
    store.close()


def test_ends_and_stop_texts_are_those_without(model_folder, monkeypatch):
    model, _ = open_model(model_folder, "bfloat16")
    expected = answers(model, HOT)
    model.eos_ids = frozenset(ids[index] for index, ids in enumerate(expected.values(), 5))
    check(monkeypatch, "right", model, HOT)
    model.eos_ids = frozenset()
    prompt, plain = next(iter(expected)), moeyard.load(model_folder, "bfloat16")
    whole = "".join(plain.stream(prompt, 20, **HOT))
    streams = [one.stream(prompt, 20, stop=whole[7:9], **HOT) for one in (plain, model)]
    told = [("".join(stream), stream.finish_reason, stream.num_tokens) for stream in streams]
    assert told[0] == told[1] and told[0][:2] == (whole[: whole.index(whole[7:9])], "stop")


def test_guesses_that_are_too_much_for_the_memory_are_left_out(model_folder, monkeypatch):
    model, _ = open_model(model_folder, "bfloat16")
    expected = answers(model, GREEDY)
    most_rows = sum(map(len, expected))
    use_told(monkeypatch, "right", expected, most_each=most_rows)
    counts = speculate(model, "told", 16)
    with short_of_memory(model, "logits", 4):
        assert answers(model, GREEDY) == expected
    assert counts.accepted > 0


def test_an_expert_that_wrong_guesses_chose_cannot_end_an_answer(model_folder, monkeypatch):
    """Reads of experts that the answer never needs fail; guesses choose them all the time."""
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    needed, reads, failures = set(), ModelFolder.expert_reads, []

    def read(folder, layer, expert, views, *more):
        def fail():
            failures.append((layer, expert))
            raise OSError(5, "Input/output error")

        if is_plain:
            needed.add((layer, expert))
        known = is_plain or (layer, expert) in needed
        return reads(folder, layer, expert, views, *more) if known else [fail]

    monkeypatch.setattr(ModelFolder, "expert_reads", read)
    is_plain = True
    model, store = open_model(model_folder, "bfloat16", expert_memory="50%")
    expected = answers(model, GREEDY, rows=[[3]], tokens=5)
    store.close()
    is_plain = False
    model, store = open_model(model_folder, "bfloat16", expert_memory="50%")
    use_told(monkeypatch, "wrong", expected)
    speculate(model, "told", 16)
    assert answers(model, GREEDY, rows=[[3]], tokens=5) == expected
    assert failures
    with pytest.raises(ExpertReadError):
        answers(model, GREEDY)
    store.close()


def test_the_command_says_what_it_says_without(model_folder, capsys):
    command = ["generate", str(model_folder), "ab ab ab ab ab", "--max-new-tokens", "60"]
    command += ["--temperature", "0", "--ignore-eos"]
    assert main(command) == 0
    plain = capsys.readouterr()
    assert main([*command, "--speculative", "suffix"]) == 0
    found = capsys.readouterr()
    assert found.out == plain.out and " drafted=" in found.err and "drafted" not in plain.err


def test_what_does_not_go_with_guesses_is_refused(model_folder, monkeypatch, tmp_path, capsys):
    routes = ["--record-routes", str(tmp_path / "r"), "--speculative", "ngram"]
    assert main(["generate", str(model_folder), "ab", *routes]) == 2
    assert "but drafted tokens that are wrong have routes" in capsys.readouterr().err
    model, _ = open_model(model_folder)
    with pytest.raises(ConfigError, match="for models on the CPU, but this one is on 'meta'"):
        open_speculation("ngram", 16, model.decoder.to("meta"), DraftCounts)
    monkeypatch.setattr(library, "_loaded", library.Library(None, "left out"))
    with pytest.raises(ConfigError, match="speculative needs the C\\+\\+ kernels in fp32"):
        moeyard.load(model_folder, "fp32", speculative="ngram")


def test_what_cannot_work_is_refused_before_a_model_is_opened(tmp_path, capsys):
    """The folder is none, which opening it would say."""
    with pytest.raises(ConfigError, match="'medusa'; use one of none, ngram, suffix"):
        moeyard.load(tmp_path, speculative="medusa")
    with pytest.raises(ConfigError, match="speculative-rows is 0; use a number from 1"):
        moeyard.load(tmp_path, speculative="ngram", speculative_rows=0)
    copies = {"expert_memory": "25%", "expert_fallback": "copy", "expert_fallback_above": 0.5}
    with pytest.raises(ConfigError, match="and expert-fallback 'copy'"):
        moeyard.load(tmp_path, speculative="ngram", **copies)
    with pytest.raises(ConfigError, match="for models on the CPU, but this one is on 'cuda:1'"):
        check_rows(1, torch.device("cuda:1"))
    for command in (["generate", str(tmp_path), "ab"], ["chat", str(tmp_path)]):
        assert main([*command, "--speculative", "medusa"]) == 2
        assert "speculative is 'medusa'" in capsys.readouterr().err
    routes = ["--record-routes", str(tmp_path / "r"), "--expert-correction", "4"]
    assert main(["generate", str(tmp_path), "ab", *routes]) == 2
    assert "expert-correction computes tokens twice" in capsys.readouterr().err
