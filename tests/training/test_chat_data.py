"""Chat data: which tokens are targets, and that training computes what transformers computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeyard.chat_templates.renderer import TemplateProcess
from moeyard.cli import main as command
from moeyard.errors import DataError
from moeyard.moe.routes.reader import read_routes
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.export import export
from moeyard.training.data.chat_mask import ChatEncoder, Encoded
from moeyard.training.data.chat_records import Conversations, conversation_of
from moeyard.training.data.chat_windows import NO_TARGET, ChatWindows, ChatWriter
from moeyard.training.data.tokenizer import ByteTokenizer

from hf_families import save
from kills import digest
from launch import moeyard_train

ROOT = Path(__file__).parent.parent.parent
TAGGED = ROOT / "configs" / "train" / "chat.jinja"
VOCABULARY = 260

UNTAGGED = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' and loop.last %}(thinks) {% endif %}
{{- m.content.strip() }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
"""Writes something before the last answer alone, as Qwen3's does, and ends turns by a token."""


def conversation(number: int) -> list[dict]:
    messages = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
    for turn in range(1 + number % 2):
        messages.append({"role": "user", "content": f"What is {number} + {turn}?"})
        messages.append({"role": "assistant", "content": f"It is {number + turn}."})
    return messages


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    lines = [json.dumps({"messages": conversation(number)}) for number in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A small Qwen3-MoE folder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save("qwen3_moe", folder, vocab_size=VOCABULARY)
    ByteTokenizer().save(folder)
    shutil.copy(TAGGED, folder / "chat_template.jinja")
    return folder


def options(start: Path, chat_file: Path, run: Path, *more: str) -> list[str]:
    data = [f"data={{format: chat, source: {chat_file}, tokenizer: null}}", "model=null"]
    loop = ["train.sequence_length=160", "train.batch_sequences=4", "train.steps=2"]
    return [f"run_dir={run}", f"start_from={start}", *data, *loop, *more]


@pytest.fixture(scope="module")
def process():
    with TemplateProcess() as process:
        yield process


@pytest.fixture
def encoder_of(tmp_path, process):
    """Make an encoder of bytes with a template."""

    def make(template: str) -> ChatEncoder:
        (tmp_path / "t.jinja").write_text(template)
        return ChatEncoder(ByteTokenizer(), tmp_path / "t.jinja", process)

    return make


@pytest.fixture
def tagged(process) -> ChatEncoder:
    return ChatEncoder(ByteTokenizer(), TAGGED, process)


def encode(encoder: ChatEncoder, messages: list[dict], **record) -> Encoded:
    chat = conversation_of({"messages": messages, **record}, "line 7")
    return encoder.encode("line 7", chat)


def answers_in(encoder: ChatEncoder, messages: list[dict], **record) -> list[str]:
    """Return the runs of trained bytes; the end of text is shown as $."""
    encoded = encode(encoder, messages, **record)
    spelled = "".join("$" if token == 256 else chr(token) for token in encoded.ids)
    marked = "".join(c if a else "\n" for c, a in zip(spelled, encoded.is_answer, strict=True))
    return [part for part in marked.split("\n") if part]


def test_answers_are_found_by_tags_and_by_difference(encoder_of, tagged):
    messages = conversation(3)
    wanted = ["It is 3.$", "It is 4.$"]
    assert answers_in(tagged, messages) == wanted
    # What the template writes after the prompt for an answer, the model must write too.
    found = answers_in(encoder_of(UNTAGGED), messages)
    assert found == ["It is 3.$", "(thinks) It is 4.$"]
    spaced = UNTAGGED.replace("{{ eos_token }}", " {{ eos_token }}")
    found = answers_in(encoder_of(spaced), messages)
    assert found == ["It is 3. $", "(thinks) It is 4. $"]


def test_the_mask_of_tags_is_that_of_transformers(tagged):
    tokenizer = ByteTokenizer().transformers()
    for number in range(6):
        theirs = tokenizer.apply_chat_template(
            conversation(number),
            chat_template=TAGGED.read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ours = encode(tagged, conversation(number))
        assert ours.ids == theirs["input_ids"]
        assert ours.is_answer == [bool(bit) for bit in theirs["assistant_masks"]]


class SpaceInFront:
    """A tokenizer of words with the space in front, whose offsets leave the space out."""

    @staticmethod
    def transformers():
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = ["Q", ":", "Say", "Ġanswer", "Ġ", "$", "!", "Answer", "answer"]
        rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "!"))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.post_processor = processors.ByteLevel(trim_offsets=True)
        return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="$")


def test_a_token_with_the_end_of_the_prompt_in_it_is_no_target(tmp_path, process):
    turn = "{% for m in messages %}Say:%s{% generation %}%s{{ m.content }}$"
    turn += "{% endgeneration %}{% endfor %}"
    for before, behind, wanted in (("", " ", ["Ġanswer", "$"]), (" ", "", ["$"])):
        (tmp_path / "t.jinja").write_text(turn.replace("%s", before, 1).replace("%s", behind, 1))
        encoder = ChatEncoder(SpaceInFront(), tmp_path / "t.jinja", process)
        encoded = encode(encoder, [{"role": "assistant", "content": "answer"}])
        pairs = zip(encoded.ids, encoded.is_answer, strict=True)
        trained = [token for token, is_answer in pairs if is_answer]
        names = SpaceInFront.transformers().convert_ids_to_tokens(trained)
        assert names == wanted, (before, encoded)


def test_the_shapes_that_people_have_say_the_same():
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for record in (
        {"messages": wanted},
        {"prompt": "a", "completion": "b"},
        {"prompt": wanted[:1], "completion": wanted[1:]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, wanted[1]]},
    ):
        assert conversation_of(record, "here").messages == wanted


BAD = {
    "shape": ({"text": "a"}, "line 2 is not a conversation; use"),
    "role": ({"messages": [{"role": "boss", "content": "a"}]}, "line 2 has the role 'boss'"),
    "speaker": ({"conversations": [{"from": "boss", "value": "a"}]}, 'line 2 has a turn "from"'),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "content 5; give valid text"),
    "empty": ({"messages": []}, "line 2 is not a conversation"),
    "surrogate": ({"prompt": "\ud800", "completion": "b"}, "give valid text"),
    "list": ({"conversations": [{"from": ["x"], "value": "a"}]}, "has a turn \"from\" ['x']"),
    "weight": (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        "a message of weight 0.5; use 1 to train on an answer and 0",
    ),
    "prompt": ({"prompt": 5, "completion": "b"}, "line 2 is not a conversation"),
    "answer in a prompt": (
        {"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"},
        "has an answer in its prompt",
    ),
    "only weight 0": (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
        "or all of weight 0",
    ),
    "tools": ({"prompt": "a", "completion": "b", "tools": [5]}, "give a list of JSON schemas"),
    "text tools": ({"prompt": "a", "completion": "b", "tools": "{]"}, "tools that are not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_refused_with_their_line(case):
    record, problem = BAD[case]
    with pytest.raises(DataError) as caught:
        conversation_of(json.loads(json.dumps(record)), "line 2")
    assert problem in str(caught.value) and "line 2" in str(caught.value)


def test_nothing_is_written_where_one_conversation_is_bad(tmp_path, config_file, capsys):
    path = tmp_path / "bad.jsonl"
    record, problem = BAD["role"]
    path.write_text(json.dumps({"messages": conversation(0)}) + "\n" + json.dumps(record))
    data = f"data={{format: chat, source: {path}, tokenizer: bytes, chat_template: {TAGGED}}}"
    assert main([str(config_file), f"run_dir={tmp_path}/run", data]) == 2
    said = capsys.readouterr().err
    assert problem in said.splitlines()[-1]
    assert not list((tmp_path / "run" / "data").glob("*"))


TEMPLATES = {
    "refuses": (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{% endfor %}",
        "refuses these messages (no tools)",
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "does not show where an answer begins and ends",
    ),
    "no content": (
        "{% for m in messages %}{{ m.role }}{{ eos_token }}{% endfor %}",
        "does not show where an answer begins and ends",
    ),
    "raises": ("{{ 1 / 0 }}", "fails on these messages (ZeroDivisionError: division by zero"),
    "syntax": ("{% for %}", "is not Jinja (line 1: Expected an expression"),
    "memory": ("{{ 'x' * 9999999999 }}", "fails on these messages (it needs more than 256 MiB"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_that_do_not_fit_are_refused(case, encoder_of):
    template, problem = TEMPLATES[case]
    messages = [*conversation(1), {"role": "tool", "content": "4"}]
    with pytest.raises(DataError) as caught:
        encode(encoder_of(template), messages)
    assert problem in str(caught.value) and "line 7" in str(caught.value)


def test_calls_of_tools_need_a_template_with_tags(encoder_of):
    messages = [*conversation(1), {"role": "assistant", "content": None, "tool_calls": [{}]}]
    with pytest.raises(DataError, match="only if the chat template marks answers"):
        encode(encoder_of(UNTAGGED), messages)


WITH_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"


@pytest.mark.parametrize("is_text", [False, True])
def test_tools_are_what_the_template_gets_with_every_rendering(is_text, encoder_of, tagged):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    given = json.dumps(tools) if is_text else tools
    encoder = encoder_of(WITH_TOOLS + UNTAGGED)
    encoded = encode(encoder, conversation(1), tools=given)
    plain = encode(encoder, conversation(1))
    assert bytes(encoded.ids[:4]) == b"add\n" and encoded.ids[4:] == plain.ids
    assert encoded.is_answer == [False] * 4 + plain.is_answer
    with pytest.raises(DataError, match="has tools, which the chat template does not write"):
        encode(tagged, conversation(1), tools=tools)


def test_answers_of_weight_0_are_read_and_not_trained_on(encoder_of, tagged):
    messages = conversation(3)
    messages[-1]["weight"], messages[-3]["weight"] = 1, 0
    for encoder, wanted in ((tagged, "It is 4.$"), (encoder_of(UNTAGGED), "(thinks) It is 4.$")):
        assert answers_in(encoder, messages) == [wanted]
        assert encode(encoder, messages).ids == encode(encoder, conversation(3)).ids
    part = "{% generation %}{{ m.content }}{% endgeneration %}"
    halves = "{% for m in messages if m.role == 'assistant' %}" + part + part + "{% endfor %}"
    with pytest.raises(DataError, match="marks 4 parts of 2 answers"):
        encode(encoder_of(halves), messages)


def test_a_template_that_takes_parts_gets_them(encoder_of):
    loop = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    parts = UNTAGGED.replace("{{- m.content.strip() }}", "{#- -#}" + loop)
    whole = encode(encoder_of(UNTAGGED), conversation(1))
    assert encode(encoder_of(parts), conversation(1)) == whole


def windows_of(folder: Path, encoder: ChatEncoder, length: int, batch: int = 2) -> ChatWindows:
    writer = ChatWriter()
    for number in range(12):
        writer.add(encode(encoder, conversation(number)))
    writer.write(folder / "chat.safetensors", "x")
    return ChatWindows(folder / "chat.safetensors", length, batch, 0, "training")


def test_windows_hold_whole_conversations_and_count_what_they_lose(tmp_path, tagged):
    windows = windows_of(tmp_path, tagged, 200)
    whole = [encode(tagged, conversation(number)) for number in range(12)]
    rows = windows.rows(list(range(len(windows))))
    assert rows.lengths == tuple(len(encoded.ids) - 1 for encoded in whole)
    assert all(sum(windows.rows([w]).lengths) <= 200 for w in range(len(windows)))
    targets = [
        token if said else NO_TARGET
        for encoded in whole
        for token, said in zip(encoded.ids[1:], encoded.is_answer[1:], strict=True)
    ]
    assert rows.targets_N.tolist() == targets
    assert windows.facts.cut == windows.facts.left_out == 0
    short = windows_of(tmp_path, tagged, 50)
    assert short.facts.cut > 0 and short.facts.left_out > 0
    assert max(short.rows(list(range(len(short)))).lengths) <= 50
    with pytest.raises(DataError, match=r"no answer within train.sequence_length = 5 tokens"):
        windows_of(tmp_path, tagged, 5)


def test_counts_of_rows_and_targets_are_those_of_the_batches(tmp_path, tagged):
    windows = windows_of(tmp_path, tagged, 200, batch=5)
    batches = [windows.rows(windows.at(step, range(5))) for step in range(9)]
    assert [windows.num_targets(s) for s in range(9)] == [
        int((batch.targets_N != NO_TARGET).sum()) for batch in batches
    ]
    rows = [len(batch.ids_N) for batch in batches]
    assert windows.num_rows_of(list(range(len(windows)))) == [
        len(windows.rows([window]).ids_N) for window in range(len(windows))
    ]
    for first in range(9):
        for last in range(first, 10):
            assert windows.num_rows(range(first, last)) == sum(rows[first:last])


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reference_loss(model: torch.nn.Module, run: Path, config: dict) -> float:
    """Score each conversation of the first batch alone, with transformers' tokenizer and mask."""
    windows = ChatWindows(run / "data/chat-train.safetensors", **config, name="training")
    rows = windows.rows(windows.at(0, range(config["batch"])))
    total, count = 0.0, 0
    for ids, targets in zip(
        rows.ids_N.split(list(rows.lengths)), rows.targets_N.split(list(rows.lengths)), strict=True
    ):
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        total += float(F.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="sum"))
        count += int((targets != NO_TARGET).sum())
    return total / count


@pytest.mark.parametrize("kind", ["all", "router", "lora"])
def test_the_loss_is_that_of_transformers_before_and_after_a_step(
    kind, tmp_path, config_file, start, chat_file
):
    run = tmp_path / "run"
    given = options(
        start, chat_file, run, f"train.parameters={kind}", "train.log_every=1", "seed=7"
    )
    lora = ["lora={rank: 3}"] if kind == "lora" else []
    assert main([str(config_file), *given, *lora, "train.steps=1", "optimizer.lr=0.01"]) == 0
    record = losses(run)[0]
    windows = {"length": 160, "batch": 4, "seed": 7}
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    assert record["loss"] == pytest.approx(reference_loss(model, run, windows), rel=1e-5)
    routed = model.config.num_experts_per_tok * record["step_tokens"]
    assert all(sum(layer) == routed for layer in record["expert_tokens"])
    assert all(layer["dropped"] == 0 for layer in record["load"])

    export(run, tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    held_out = ChatWindows(run / "data/chat-eval.safetensors", 160, 4, 0, "held-out")
    rows = held_out.rows(list(range(len(held_out))))
    total = 0.0
    for ids, targets in zip(
        rows.ids_N.split(list(rows.lengths)), rows.targets_N.split(list(rows.lengths)), strict=True
    ):
        with torch.no_grad():
            scores = trained(ids[None]).logits[0]
        total += float(F.cross_entropy(scores, targets, ignore_index=NO_TARGET, reduction="sum"))
    wanted = total / int((rows.targets_N != NO_TARGET).sum())
    assert record["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TAGGED.read_text()


@pytest.mark.dist
def test_two_ranks_with_split_experts_and_a_resumed_run_end_alike(
    tmp_path, config_file, start, chat_file
):
    exact = ["train.precision=fp64", "parallel.backend=reference", "train.log_every=1"]
    given = options(start, chat_file, tmp_path / "one", *exact)
    assert main([str(config_file), *given]) == 0
    two = options(start, chat_file, tmp_path / "two", *exact, "parallel.ep=2")
    moeyard_train(str(config_file), "--nproc", "2", *two, "monitor.routes={}")
    routes = read_routes(tmp_path / "two/routes")
    names = zip(routes.steps_N, routes.sequences_N, routes.positions_N, strict=True)
    assert len(set(names)) == len(routes) == losses(tmp_path / "two")[-1]["tokens"]
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        for key in (
            "loss",
            "balance",
            "grad_norm",
            *(("eval_loss",) if "eval_loss" in ours else ()),
        ):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-11)
        assert ours["expert_tokens"] == theirs["expert_tokens"]
    broken = options(start, chat_file, tmp_path / "broken", *exact)
    assert main([str(config_file), *broken, "train.steps=1", "checkpoint.every=1"]) == 0
    assert main([str(config_file), *broken, "checkpoint.every=1"]) == 0
    assert digest(tmp_path / "broken") == digest(tmp_path / "one")


def test_copies_of_held_out_conversations_are_not_trained_on(tmp_path, config_file, capsys):
    path = tmp_path / "chat.json"
    numbers = [*range(20), 0, 0, 20, 20]
    path.write_text(json.dumps([{"messages": conversation(number)} for number in numbers]))
    data = f"data={{format: chat, source: {path}, tokenizer: bytes, chat_template: {TAGGED}}}"
    loop = ["train.sequence_length=160", "train.steps=1", "train.batch_sequences=2"]
    assert main([str(config_file), f"run_dir={tmp_path}/run", data, *loop]) == 0
    # Every 20th is held out: 0 (with its copies) and the 21st, which is a 0, too.
    said = capsys.readouterr().err
    assert "event=chat_train conversations=21 " in said
    assert "event=chat_held_out conversations=2 " in said


def test_tokenize_shows_what_is_trained_on_and_writes_nothing(tmp_path, chat_file, capsys):
    given = ["--format", "chat", "--tokenizer", "bytes", "--chat-template", str(TAGGED)]
    assert command(["tokenize", str(chat_file), *given, "--show", "2"]) == 0
    said = capsys.readouterr().out
    assert "[[It is 0.<|endoftext|>]]" in said and said.count("== ") == 2
    assert command(["tokenize", str(chat_file), str(tmp_path / "out"), *given]) == 2
    assert "give --show N" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert command(["tokenize", str(chat_file), *given[:-2], "--show", "2"]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_control_characters_of_the_data_are_shown_escaped(tmp_path, capsys):
    answer = "\x1b[2Ja\tb\x9b\x7f é"
    record = {"prompt": "a", "completion": answer}
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    given = ["--format", "chat", "--tokenizer", "bytes", "--chat-template", str(TAGGED)]
    assert command(["tokenize", str(tmp_path / "c.jsonl"), *given, "--show", "1"]) == 0
    assert "[[\\x1b[2Ja\tb\\x9b\\x7f é<|endoftext|>]]" in capsys.readouterr().out


def test_what_is_not_json_is_refused_with_its_name(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"but data.format is chat; give a .jsonl"):
        Conversations(str(tmp_path), "data.source")
    (tmp_path / "b.jsonl").write_text("{]")
    with pytest.raises(DataError, match=r"b.jsonl line 1 is not JSON"):
        list(Conversations(str(tmp_path), "data.source"))
