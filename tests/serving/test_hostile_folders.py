"""The worst of hostile folders and templates; scripts/chaos has the others."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from moeyard.chat_templates import process as template_process
from moeyard.chat_templates import renderer as templates
from moeyard.chat_templates.renderer import Chat, Rendered, TemplateFault, TemplateProcess
from moeyard.errors import MoeyardError, RequestError
from moeyard.kernels.values import memory as kernels_memory
from moeyard.moe.folders.tokenizer_errors import library_errors
from moeyard.serving import loading, memory, resident
from moeyard.serving.engine.tokenizer import ServingTokenizer
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model

from http_calls import call, check_error

USER = [{"role": "user", "content": "a"}]


@pytest.fixture(autouse=True)
def never_hang():
    """A fault here is a wait without end; the alarm ends it."""

    def stop(*_):
        raise AssertionError("it did not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder_instead(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def huge(path):
    path.touch()
    os.truncate(path, 10 << 30)


def many_keys(path):
    path.write_text(json.dumps({f"key{index}": 0 for index in range(20_000)}))


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [pipe, device, huge])
def test_what_is_no_small_file_is_refused_and_not_read(model_folder, tmp_path, name, make):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    make(folder / name)
    with pytest.raises(MoeyardError) as error:
        check_model(ServeArgs(model=str(folder)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("make", [folder_instead, many_keys])
def test_a_folder_and_a_million_keys_are_no_configuration(model_folder, tmp_path, name, make):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    make(folder / name)
    with pytest.raises(MoeyardError, match=r"Is a directory|20000 keys, at most 10000"):
        check_model(ServeArgs(model=str(folder)))


def test_a_bad_generation_config_is_refused_by_the_check(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(MoeyardError, match="temperature = 'hot'"):
        check_model(ServeArgs(model=str(folder)))


def test_tensors_that_share_bytes_are_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    header[second]["data_offsets"] = header[first]["data_offsets"]
    # An empty tensor inside another one shares nothing, and hides nothing.
    middle = sum(header[first]["data_offsets"]) // 2
    header["empty"] = {"dtype": "F32", "shape": [0], "data_offsets": [middle, middle]}
    text = json.dumps(header).encode()
    changed = struct.pack("<Q", len(text)) + text + data[8 + length :]
    (folder / "model.safetensors").write_bytes(changed)
    with pytest.raises(MoeyardError, match="share bytes"):
        check_model(ServeArgs(model=str(folder)))


@pytest.mark.parametrize("budget", [None, "50%"])
def test_a_model_larger_than_memory_is_refused_before_it_is_allocated(
    model_folder, monkeypatch, budget
):
    def allocate(*_, **__):
        raise AssertionError("it was allocated")

    monkeypatch.setattr(memory, "available_bytes", lambda: 30_000)
    monkeypatch.setattr(resident, "empty_experts", allocate)
    args = ServeArgs(model=str(model_folder), expert_memory=budget)
    with pytest.raises(MoeyardError, match=r"needs .* GiB of memory, .* for experts, but only"):
        check_model(args, runs_here=True)
    with pytest.raises(MoeyardError, match="set a smaller expert-memory"):
        Server(args)
    check_model(args)  # elsewhere there may be more


def test_the_check_of_a_budget_allocates_nothing(model_folder, monkeypatch):
    monkeypatch.setattr("moeyard.serving.experts.opening.empty_experts", None)
    check_model(ServeArgs(model=str(model_folder), expert_memory="25%"))


def test_an_allocator_that_gives_up_while_loading_is_a_sentence(model_folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(resident, "empty_experts", fail)
    with pytest.raises(MoeyardError, match="not enough memory to load"):
        loading.open_model(model_folder)
    assert kernels_memory.is_out_of_memory(MemoryError())


def test_free_memory_is_the_least_of_machine_groups_and_limit(monkeypatch, tmp_path):
    assert 0 < memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() * 2
    monkeypatch.setattr(memory, "_of_machine", lambda: iter([900]))
    monkeypatch.setattr(memory, "_of_process", lambda: iter([]))
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    assert memory.available_bytes() in (500, 900)  # 900 where the machine has no unified group


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BAD = {
    LOOP: "not ended after",
    "{{ 'x' * 9999999999 }}": "needs more than 256 MiB",
    "{{ 'x' * 9999999 }}": "makes 9999999 characters",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "{% import 'os' as os %}": "no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nested too deeply",
    "{{ '\\ud800' }}": "not valid Unicode",
}


@pytest.fixture(scope="module")
def quick():
    """Let a loop end soon: the limit is read by the process, from its own file."""
    text = Path(template_process.__file__).read_text(encoding="utf-8")
    return text.replace("CPU_LIMIT_S = 2", "CPU_LIMIT_S = 0.2")


@pytest.fixture(scope="module")
def process(quick, tmp_path_factory):
    file = tmp_path_factory.mktemp("process") / "template_process.py"
    file.write_text(quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates.template_process, "__file__", str(file))
        process = TemplateProcess()
        yield process
        process.close()


@pytest.mark.parametrize("template", BAD, ids=BAD.values())
def test_a_bad_template_has_a_reason_and_the_next_one_is_rendered(process, template):
    with pytest.raises(TemplateFault, match=BAD[template]) as fault:
        process.render(template, USER, {})
    assert fault.value.kind == ("ended" if template == LOOP else "failure")
    assert process.render("{{ messages[0].content }}!", USER, {}) == "a!"


def test_special_tokens_and_messages_arrive_as_they_are(process):
    text = 'naïve 日本 \u2028 " \\ \n end'
    template = "{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}"
    messages = [{"role": "user", "content": text}]
    assert process.render(template, messages, {"bos_token": "<s>"}) == f"<s>{text}True"


def test_a_process_that_was_ended_is_started_again(process):
    process.render("a", USER, {})
    running = process._process
    running.kill()
    running.wait()
    assert process.render("b", USER, {}) == "b"


def test_the_process_sees_no_key_and_may_write_no_file(process, monkeypatch):
    monkeypatch.setenv("MOEYARD_API_KEY", "secret")
    process.close()
    process.render("a", USER, {})
    environment = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    limits = Path(f"/proc/{process._process.pid}/limits").read_text()
    assert b"PATH=" in environment and b"secret" not in environment
    assert any(line.split()[:4] == ["Max", "file", "size", "0"] for line in limits.splitlines())


def test_a_process_that_cannot_start_is_503(monkeypatch, model_folder, tmp_path):
    (tmp_path / "t.jinja").write_text("a")
    monkeypatch.setattr(templates.sys, "executable", "/bin/false")
    with pytest.raises(RequestError, match="could not start; try again later") as error:
        ServingTokenizer(model_folder, str(tmp_path / "t.jinja"))
    assert error.value.status == 503 and error.value.retry_after_s == 5


def test_a_job_of_several_conversations_has_their_texts_in_order_and_ends_with_a_fault(process):
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = "{% for m in messages %}" + marked + "{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}{{ tools[0].name }}"
    tools = [{"name": "t"}]
    good = [Chat(USER, tools, add_generation_prompt=False), Chat([*USER, *USER], tools)]
    found = process.render_all(template, good, {}, has_tags=True)
    assert [one.text for one in found] == ["at", "aa>t"]
    assert [one.answers for one in found] == [[(0, 1)], [(0, 1), (1, 2)]]
    with pytest.raises(TemplateFault, match="has no element 0"):
        process.render_all(template, [good[0], Chat(USER, []), good[1]], {})
    assert process.render_all(template, good[1:], {}) == [Rendered("aa>t", [])]
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateFault, match="nested too deeply"):
        process.render_all(template, [Chat(USER, deep)], {})


def test_a_template_that_fails_on_some_messages_gives_400_and_the_server_goes_on(
    model_folder, tmp_path, process
):
    template = tmp_path / "t.jinja"
    template.write_text("{% if messages[0].content == 'boom' %}" + LOOP + "{% endif %}a")
    args = {"model": str(model_folder), "served_model_name": "m", "chat_template": str(template)}
    server = Server(ServeArgs(**args))
    for content, status in (("boom", 400), ("a", 200)):
        messages = [{"role": "user", "content": content}]
        body = {"model": "m", "messages": messages, "max_tokens": 2}
        answer = call(server, "POST", "/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert check_error(answer, 400, "fails on these messages")["param"] == "messages"
    process_of = server._tokenizer._templates._process
    server.close()
    assert isinstance(process_of, subprocess.Popen) and process_of.poll() is not None


def test_a_template_that_never_ends_on_calls_of_tools_serves_other_chats(
    model_folder, tmp_path, process
):
    template = tmp_path / "t.jinja"
    template.write_text("{% if messages[-1].tool_calls %}" + LOOP + "{% endif %}a")
    args = {"model": str(model_folder), "served_model_name": "m", "chat_template": str(template)}
    server = Server(ServeArgs(**args))
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    answers = []
    for messages in ([*USER, {"role": "assistant", "tool_calls": calls}], USER):
        body = {"model": "m", "messages": messages, "max_tokens": 2}
        answers.append(call(server, "POST", "/v1/chat/completions", json=body))
    server.close()
    error = check_error(answers[0], 400, "does not write calls (it fails: it has not ended after")
    assert error["param"] == "messages[1].tool_calls"
    assert answers[1].status_code == 200, answers[1].text


def test_a_panic_of_the_tokenizer_is_400_and_the_server_goes_on(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    parts = [{**split, "invert": False}, values["pre_tokenizer"]]
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    server = Server(ServeArgs(model=str(folder)))
    body = {"model": "m", "prompt": "a" * 40 + "!", "max_tokens": 2}
    answer = call(server, "POST", "/v1/completions", json=body)
    check_error(answer, 400, "the model's tokenizer fails on this text")
    assert call(server, "POST", "/v1/completions", json={**body, "prompt": "b"}).status_code == 200
    assert server.admission.num_open == 0
    server.close()


def test_what_ends_a_program_is_not_taken_for_a_failure_of_the_library():
    with pytest.raises(KeyboardInterrupt), library_errors(RequestError):
        raise KeyboardInterrupt
