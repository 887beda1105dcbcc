"""Preference pairs: their shapes, what is compared, how they are cut, and their order."""

import json

import pytest
from preference_pairs import pair, write

from moeyard.chat_templates.renderer import TemplateProcess
from moeyard.cli import main as command
from moeyard.errors import DataError
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.chat_mask import ChatEncoder
from moeyard.training.data.chat_windows import ChatWriter
from moeyard.training.data.preference import build_preference_data
from moeyard.training.data.preference_pairs import PreferencePairs
from moeyard.training.data.preference_records import Pairs, pair_of
from moeyard.training.data.tokenizer import ByteTokenizer
from moeyard.training.read_config import read_run_config

from launch import ROOT

TEMPLATE = ROOT / "configs" / "train" / "chat.jinja"
USER = {"role": "user", "content": "a"}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def test_the_shapes_that_people_have_say_the_same():
    wanted = pair_of({"prompt": "a", "chosen": "b", "rejected": "c"}, "here")
    assert wanted.chosen.messages == [USER, assistant("b")]
    assert wanted.rejected.is_trained == [False, True]
    whole = {"chosen": [USER, assistant("b")], "rejected": [USER, assistant("c")]}
    for record in (
        {"prompt": [USER], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"prompt": "a", "chosen": [assistant("b")], "rejected": "c"},
        whole,
        {"prompt": "a", **whole},
        {"prompt": [USER], "chosen": "b", "rejected": whole["rejected"]},
    ):
        assert pair_of(record, "here") == wanted, record


def test_what_both_sides_begin_with_is_the_prompt():
    before = [USER, assistant("x"), {"role": "user", "content": "more"}]
    sides = {"chosen": [*before, assistant("b")], "rejected": [*before, assistant("c")]}
    assert pair_of(sides, "here").chosen.is_trained == [False, False, False, True]
    longer = {"chosen": before[:2], "rejected": [*before, assistant("c")]}
    found = pair_of(longer, "here")
    assert found.chosen.is_trained == [False, True]
    assert found.rejected.is_trained == [False, True, False, True]
    quiet = pair_of({"prompt": "a", "chosen": [assistant("b", weight=0), assistant("d")],
                     "rejected": "c"}, "here")  # fmt: skip
    assert quiet.chosen.is_trained == [False, False, True]
    assert all("weight" not in message for message in quiet.chosen.messages)


BAD = {
    "no side": ({"prompt": "a", "chosen": "b"}, "line 2 is not a pair; use"),
    "not an object": (["a"], "line 2 is not a pair; use"),
    "empty side": ({"prompt": "a", "chosen": [], "rejected": "c"}, "line 2 is not a pair"),
    "number": ({"prompt": "a", "chosen": 5, "rejected": "c"}, "line 2 is not a pair"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "has an answer as text, but no prompt; give"),
    "other prompt": (
        {"prompt": "z", "chosen": [USER, assistant("b")], "rejected": "c"},
        "has a prompt, and chosen is a conversation that does not begin with it; take",
    ),
    "no answer": (
        {"prompt": "a", "chosen": "b", "rejected": [USER]},
        "line 2: rejected has no assistant message after the prompt",
    ),
    "weight 0": (
        {"prompt": "a", "chosen": [assistant("b", weight=0)], "rejected": "c"},
        "line 2: chosen has no assistant message after the prompt, or all of weight 0",
    ),
    "role": (
        {"prompt": "a", "chosen": [{"role": "boss", "content": "b"}], "rejected": "c"},
        "line 2 has the role 'boss'; use one of",
    ),
    "content": ({"prompt": "\ud800", "chosen": "b", "rejected": "c"}, "give valid text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_with_their_line(case):
    record, problem = BAD[case]
    with pytest.raises(DataError) as caught:
        pair_of(json.loads(json.dumps(record)), "line 2")
    assert problem in str(caught.value) and "line 2" in str(caught.value)


def test_what_is_not_a_file_of_pairs_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"data.format is preference; give a .jsonl"):
        Pairs(str(tmp_path), "data.source")
    (tmp_path / "b.jsonl").write_text("{]")
    with pytest.raises(DataError, match=r"b.jsonl line 1 is not JSON"):
        list(Pairs(str(tmp_path), "data.source"))


@pytest.fixture(scope="module")
def encoder():
    with TemplateProcess() as process:
        yield ChatEncoder(ByteTokenizer(), TEMPLATE, process)


def opened(folder, encoder, records, length, batch=3) -> PreferencePairs:
    writer = ChatWriter()
    for record in records:
        for side in pair_of(record, "here"):
            writer.add(encoder.encode("here", side))
    writer.write(folder / "pairs.safetensors", "x")
    return PreferencePairs(folder / "pairs.safetensors", length, batch, 0, "training")


def spelled(pairs: PreferencePairs, number: int) -> list[tuple[str, str]]:
    """Return what each side of a pair reads, and its targets; the end of text is shown as $."""
    rows = pairs.rows([number])
    parts = zip(
        rows.ids_N.split(list(rows.lengths)), rows.targets_N.split(list(rows.lengths)), strict=True
    )

    def text(ids) -> str:
        return "".join("$" if token == 256 else chr(token) for token in ids.tolist() if token >= 0)

    return [(text(ids), text(targets)) for ids, targets in parts]


def test_the_tokens_of_the_answers_and_their_ends_are_compared(tmp_path, encoder):
    pairs = opened(tmp_path, encoder, [{"prompt": "ab", "chosen": "cd", "rejected": "e"}], 99)
    prompt = "<|user|>\nab\n<|assistant|>\n"
    assert spelled(pairs, 0) == [(prompt + "cd", "cd$"), (prompt + "e", "e$")]


def test_a_long_pair_loses_the_beginning_of_its_prompt_then_the_end_of_an_answer(tmp_path, encoder):
    record = {"prompt": "p" * 40, "chosen": "x" * 20, "rejected": "y" * 8}
    (whole, _), _ = spelled(opened(tmp_path, encoder, [record], 500), 0)
    cut = opened(tmp_path, encoder, [record], len(whole) - 5)
    # Both sides lose the same part of the prompt.
    assert [ids for ids, _ in spelled(cut, 0)] == [whole[5:], whole[5:-20] + "y" * 8]
    assert (cut.facts.cut_prompts, cut.facts.cut_answers) == (1, 0)
    short = opened(tmp_path, encoder, [record], 15)
    # The last row of the prompt predicts the answer's first token, and stays.
    assert spelled(short, 0) == [("\n" + "x" * 14, "x" * 15), ("\n" + "y" * 8, "y" * 8 + "$")]
    assert (short.facts.cut_prompts, short.facts.cut_answers) == (1, 1)


def test_pairs_that_say_nothing_are_left_out_and_counted(tmp_path, encoder):
    same_start = {"prompt": "a", "chosen": "x" * 30 + "1", "rejected": "x" * 30 + "2"}
    records = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        same_start,
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [USER, assistant("b")], "rejected": [USER, assistant("b")]},
    ]
    pairs = opened(tmp_path, encoder, records, 500)
    assert (len(pairs), pairs.facts.equal) == (2, 2)
    assert pairs.facts.targets == 2 * 32 + 2 * 2
    cut = opened(tmp_path, encoder, records, 20)
    assert (len(cut), cut.facts.equal) == (1, 3)
    with pytest.raises(DataError, match=r"no pair whose answers differ within train.seq"):
        opened(tmp_path, encoder, records[:1], 500)


def test_a_side_without_a_target_in_reach_leaves_its_pair_out(tmp_path, encoder):
    # The rejected side says much more before its answer, which its length then does not reach.
    far = [USER, assistant("b", weight=0), {"role": "user", "content": "z" * 160}, assistant("c")]
    record = {"chosen": [USER, assistant("d")], "rejected": far}
    pairs = opened(tmp_path, encoder, [record, pair(1)], 90)
    assert (len(pairs), pairs.facts.no_answer) == (1, 1)
    assert len(opened(tmp_path, encoder, [record], 500)) == 1


def test_batches_and_their_rows_follow_from_the_step(tmp_path, encoder):
    pairs = opened(tmp_path, encoder, [pair(number) for number in range(7)], 200)
    seen = [number for step in range(7) for number in pairs.at(step, range(3))]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))
    for step in range(4):
        assert pairs.until(step) == list(dict.fromkeys(seen[: 3 * step]))
    rows = [len(pairs.rows(pairs.at(step, range(3))).ids_N) for step in range(7)]
    for first in range(7):
        assert pairs.num_rows(range(first, 7)) == sum(rows[first:])
    assert pairs.num_rows_of([4, 2]) == [len(pairs.rows([n]).ids_N) for n in (4, 2)]
    assert pairs.rows([]).lengths == ()


def test_copies_of_held_out_pairs_are_not_trained_on(tmp_path, config_file):
    path = tmp_path / "pairs.json"
    numbers = [*range(20), 0, 0, 20, 20]
    path.write_text(json.dumps([pair(number) for number in numbers]))
    data = f"data={{format: preference, source: {path}, chat_template: {TEMPLATE}}}"
    overrides = [f"run_dir={tmp_path}", data, "train.sequence_length=160"]
    config = read_run_config(config_file, overrides)
    found = build_preference_data(config, tmp_path / "data", Mesh())
    # Every 20th is held out: 0 (with its copies) and the 21st, which is a 0, too.
    assert (found.train.facts.pairs, found.held_out.facts.pairs) == (21, 2)


def test_tokenize_shows_both_sides_and_what_is_compared(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl")
    given = ["--format", "preference", "--tokenizer", "bytes", "--chat-template", str(TEMPLATE)]
    assert command(["tokenize", str(path), *given, "--show", "2"]) == 0
    said = capsys.readouterr().out
    assert "[[It is 1.<|endoftext|>]]" in said and "[[0<|endoftext|>]]" in said
    assert said.count("== ") == 4 and said.count(": chosen: ") == 2
    assert command(["tokenize", str(path), str(tmp_path / "out"), *given]) == 2
    assert "--format is preference" in capsys.readouterr().err
