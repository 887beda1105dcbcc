"""Which chat template is used, and that it is given contents in the form it reads."""

import json

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moeyard.chat_templates.chat_template import ContentFormat, content_format_of, pick_template
from moeyard.chat_templates.renderer import TemplateFault
from moeyard.chat_templates.tool_form import ToolForm, tool_support
from moeyard.errors import ConfigError, RequestError
from moeyard.serving.api.tool_messages import check_written
from moeyard.serving.engine.tokenizer import ServingTokenizer
from moeyard.training.data.tokenizer import ByteTokenizer

TWO_PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
TEXT = ContentFormat()
PARTS = ContentFormat(takes_text=False, takes_parts=True)
BOTH = ContentFormat(takes_text=True, takes_parts=True)
LOOP = "{% for m in messages %}BODY{% endfor %}"
PART = "{{ part.text }}{% endfor %}"
BODIES = {
    "plain": ("{{ m['content'] }}", TEXT),
    "trimmed": ("{{ m.content | trim }}", TEXT),
    "lines": ("{% for line in m.content.split('\n') %}{{ line }}{% endfor %}", TEXT),
    "calls": ("{{ m.content }}{% for call in m.tool_calls %}{{ call }}{% endfor %}", TEXT),
    "loop": ("{% for part in m.content %}" + PART, PARTS),
    "subscript": ("{% for part in m['content'] %}" + PART, PARTS),
    "get": ("{% for part in m.get('content', []) %}" + PART, PARTS),
    "variable": ("{% set c = m['content'] %}{% for part in c %}" + PART, PARTS),
    "filter": ("{% for part in m.content | selectattr('type', 'eq', 'text') %}" + PART, PARTS),
    "or_nothing": ("{% for part in m.content or [] %}" + PART, PARTS),
    "either": (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        + PART
        + "{% endif %}",
        BOTH,
    ),
    "generation": ("{% generation %}{{ m.content }}{% endgeneration %}", TEXT),
}
TEMPLATES = {name: (LOOP.replace("BODY", body), form) for name, (body, form) in BODIES.items()}
TEMPLATES |= {
    "rest": (
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% for m in rest %}{% for part in m.content %}" + PART + "{% endfor %}",
        PARTS,
    ),
    "namespace": (
        "{% set ns = namespace(all=[]) %}{% set ns.all = messages %}"
        "{% for m in ns.all %}{% for part in m.content %}" + PART + "{% endfor %}",
        PARTS,
    ),
    "first": ("{% for part in messages[0].content %}" + PART, PARTS),
    "macro": (
        "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for part in c %}"
        + PART
        + "{% endif %}{% endmacro %}"
        + LOOP.replace("BODY", "{{ show(m.content) }}"),
        BOTH,
    ),
    "broken": ("{% for m in %}", TEXT),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", TEXT),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_loops_over_contents_takes_parts(name):
    template, expected = TEMPLATES[name]
    assert content_format_of(template) == expected


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("broken", "deep")])
@pytest.mark.parametrize("content", ["ab", TWO_PARTS])
def test_no_text_is_lost_whichever_form_was_sent(name, content):
    template, form = TEMPLATES[name]
    template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    message = form.word({"role": "user", "content": content})
    compiled = ImmutableSandboxedEnvironment().from_string(template)
    assert compiled.render(messages=[message]) == "ab"


@pytest.fixture
def folder(tmp_path):
    ByteTokenizer().save(tmp_path)
    return tmp_path


def set_template(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def test_a_server_gives_its_template_what_it_takes(folder):
    template = TEMPLATES["subscript"][0]
    set_template(folder, template)
    tokenizer = ServingTokenizer(folder)
    for content in ("ab", TWO_PARTS):
        assert tokenizer.render_chat([{"role": "user", "content": content}]) == "ab"
    tokenizer.close()


def test_of_several_templates_the_default_is_used_or_the_one_that_is_named(folder):
    rag, tools = {"name": "rag", "template": "rag"}, {"name": "tool_use", "template": "tools"}
    default = {"name": "default", "template": "default"}
    message = [{"role": "user", "content": "hi"}]

    def answer(templates, given=None):
        set_template(folder, templates)
        tokenizer = ServingTokenizer(folder, given)
        text = tokenizer.render_chat(message)
        tokenizer.close()
        return text

    assert answer([rag, default]) == "default"
    assert answer([rag, default, tools], "tool_use") == answer([tools, rag], "tool_use") == "tools"
    for templates, names in (([tools, rag], "rag, tool_use"), ([rag], "rag")):
        with pytest.raises(ConfigError) as error:
            answer(templates)
        assert f"has the chat templates {names} and no default; choose one" in str(error.value)
        assert "--chat-template NAME" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="give a Jinja file or one of rag, tool_use"):
        answer([rag, tools], "tool")


def test_a_file_is_used_in_place_of_whatever_the_folder_has(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for known in (None, "theirs", {"rag": "theirs"}):
        assert pick_template(known, tmp_path, str(tmp_path / "mine")) == "mine"
    assert pick_template("", tmp_path, None) is None


def renderer_of(template):
    """Return what renders a template in this process, and counts."""

    def refuse(reason):
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = json.dumps
    compiled, form = environment.from_string(template), content_format_of(template)

    def render(messages):
        render.count += 1
        try:
            return compiled.render(messages=[form.word(message) for message in messages])
        except TemplateError as error:
            raise TemplateFault("refusal", str(error)) from None
        except Exception as error:
            raise TemplateFault("failure", str(error)) from None

    render.count = 0
    return render


CALLS = "{% for call in m.tool_calls or [] %}[{{ call.function.name }} ARGUMENTS]{% endfor %}"
OBJECTS = "{{ m.content }}" + CALLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}")
TEXTS = "{{ m.content }}" + CALLS.replace("ARGUMENTS", "{{ '' + call.function.arguments }}")
PYTHONS = "{{ m.content }}" + CALLS.replace("ARGUMENTS", "{{ call.function.arguments }}")
EITHER_OR = (
    "{% if m.content is none %}"
    + OBJECTS.removeprefix("{{ m.content }}")
    + "{% else %}{{ m.content }}{% endif %}"
)
NO_TEXT = (
    "{% if m.tool_calls %}"
    + OBJECTS.removeprefix("{{ m.content }}")
    + ("{% else %}{{ m.content }}{% endif %}")
)
NINE = "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('9!') }}"
ONE = OBJECTS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
ALONE = "{% if m.tool_calls and loop.last %}{{ raise_exception('no result') }}{% endif %}" + OBJECTS
OF_USERS = "{% if m.role != 'tool' %}" + OBJECTS + "{% endif %}"
REFUSING = "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + OBJECTS
PARTS_OF = "{% for part in m.content %}{{ part.text }}{% endfor %}"
FORMS = {
    "objects": (OBJECTS, ToolForm(), set()),
    "texts": (TEXTS, ToolForm(has_objects=False), set()),
    "dictionaries": (PYTHONS, ToolForm(has_objects=False), set()),
    "null": (EITHER_OR, ToolForm(empty_content=None), {"text"}),
    "no_text": (NO_TEXT, ToolForm(), {"text"}),
    "short_ids": (NINE + "{% endif %}" + OBJECTS, ToolForm(has_short_ids=True), set()),
    "one_call": (ONE, ToolForm(), {"several"}),
    "needs_a_result": (ALONE, ToolForm(), set()),
    "no_results": (OF_USERS, ToolForm(), {"results", "several", "text"}),
    "refuses_results": (REFUSING, ToolForm(), {"results", "several", "text"}),
    "drops_calls": ("{{ m.content }}", ToolForm(), {"calls", "results", "several", "text"}),
    "parts": (OBJECTS.replace("{{ m.content }}", PARTS_OF), ToolForm(), set()),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_calls_is_found_and_what_a_template_leaves_out(name):
    body, form, lacks = FORMS[name]
    found = tool_support(renderer_of(LOOP.replace("BODY", body)))
    assert (found.form, set(found.lacks)) == (form, lacks)


def history(content="", num_calls=1):
    ids = [f"call_{number}" for number in range(num_calls)]
    function = {"name": "add", "arguments": '{"x":  1}'}  # the text has two blanks
    calls = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
    results = [{"role": "tool", "tool_call_id": call_id, "content": "3"} for call_id in ids]
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


WRITTEN = {"objects": '[add {"x": 1}]3', "texts": '[add {"x":  1}]3', "null": '[add {"x": 1}]3'}
WRITTEN |= {"dictionaries": '[add {"x":  1}]3', "short_ids": '[add {"x": 1}]3'}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_template_gets_calls_in_the_form_that_was_found(name):
    render = renderer_of(LOOP.replace("BODY", FORMS[name][0]))
    messages = history()
    assert render(tool_support(render).form.word(messages)) == WRITTEN[name]
    assert messages == history()  # what was given is as it was


def test_short_ids_are_numbered_and_results_keep_to_their_calls():
    once = history(num_calls=3)
    worded = ToolForm(has_short_ids=True).word([*once, *once])  # the same ids again, once answered
    asked = [call["id"] for message in worded for call in message.get("tool_calls", [])]
    answered = [message["tool_call_id"] for message in worded if message["role"] == "tool"]
    assert asked == answered == [f"call0000{number}" for number in range(6)]


REFUSALS = {
    "drops_calls": (history(), "messages[0].tool_calls has calls, but", "(it leaves them out)"),
    "refuses_results": (
        history(),
        "messages[1].role is tool, but",
        "refuses them: no tools here)",
    ),
    "no_text": (
        history("so"),
        "messages[0].content has text next to calls",
        "; leave the text out",
    ),
    "one_call": (
        history("", 2),
        "messages[0].tool_calls has several calls",
        "; give each call a",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_template_would_leave_out_is_refused_with_a_remedy(name):
    messages, said, reason = REFUSALS[name]
    found = tool_support(renderer_of(LOOP.replace("BODY", FORMS[name][0])))
    with pytest.raises(RequestError, match="start the server with another --chat-tem") as error:
        check_written(messages, found)
    assert str(error.value).startswith(said) and reason in str(error.value)
    assert error.value.param == said.split()[0]
    check_written([{"role": "assistant", "content": "so"}], found)
    check_written(history(), tool_support(renderer_of(LOOP.replace("BODY", OBJECTS))))


def test_a_template_that_never_ends_on_calls_is_tried_once():
    render = renderer_of(LOOP.replace("BODY", OBJECTS))
    tried = []

    def stuck(messages):
        tried.append(messages)
        raise TemplateFault("ended", "it has not ended after 2 s of computing")

    found = tool_support(stuck)
    assert len(tried) == 1
    assert set(found.lacks) == {"calls", "results", "several", "text"}
    assert found.lacks["calls"] == "it fails: it has not ended after 2 s of computing"
    tool_support(render)
    assert render.count == 4  # a template that writes all of it costs no more
