"""Which chat template is used, and that it is given contents in the form it reads."""

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moeyard.chat_templates.chat_template import ContentFormat, content_format_of, pick_template
from moeyard.errors import ConfigError
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
