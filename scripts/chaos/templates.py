"""Hostile chat templates: a sentence at the start or 400 on a request, and the server goes on.

    python scripts/chaos/templates.py [NAME ...]

Each template is checked in a child with 40 s of computing and 3 GiB, as ``moeyard serve`` does.
Where it passes, a chat is sent, for some another with the text ``boom``, then a plain completion,
which must be what it was. No file may appear. Exits with 1 on a fault; a few minutes.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model

from bounded import bounded, finish, report, scratch
from http_calls import call
from small_model import write_random_model

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "{% for a in cycler('x').__class__ %}{% endfor %}"
GROWING = (
    "{% set ns = namespace(t='x') %}"
    "{% for i in range(64) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
)
LISTS = "{% set l = [0] %}{% for i in range(64) %}{% set _ = l.extend(l) %}{% endfor %}"
ESCAPE = "{{ %s.__globals__['os'].system('touch CANARY') }}"


def on_boom(template: str) -> str:
    """Return a template that is harmless until a message says boom."""
    condition = "{% if messages[-1].content == 'boom' %}"
    return condition + template + "{% else %}" + PLAIN + "{% endif %}"


HOSTILE = {
    "a loop without end": LOOP,
    "a string of GB": GROWING,
    "a constant of GB": "{{ 'x' * 9999999999 }}",
    "a number of 10^9 digits": "{{ 7 ** 999999999 }}",
    "a list of GB": "{{ [0] * 9999999999 }}",
    "padding of GB": "{{ '%9999999999d' % 1 }}",
    "centred in GB": "{{ 'x' | center(9999999999) }}",
    "indented by GB": "{{ 'a\nb' | indent(9999999999) }}",
    "64 MB of text": "{{ 'x' * 67108864 }}",
    "joined without end": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division by zero": "{{ 1 / 0 }}",
    "wrong types": "{{ 'a' + 1 }}",
    "a number called": "{{ 3() }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'base' %}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "half of one, made": "{{ '%c' % 55296 }}",
    "an unknown filter": "{{ 1 | mystery }}",
    "a bad format": "{{ strftime_now(3) }}",
    "undefined": "{{ nothing.at.all }}",
    "raises": "{{ raise_exception('no') }}",
    "no Jinja": "{% for %}",
    "nested 5,000 deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "5,000 ifs deep": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "100,000 statements": "{% set a = 1 %}" * 100_000,
    "sorted without end": "{{ range(99999) | sort | list | string * 9999 }}",
    "a regex-like test": "{{ ('a' * 99999) is in(['a' * 99998] * 99999) }}",
    "sum of lists": "{{ [[0] * 9999] * 9999 | sum(start=[]) }}",
    "an iterator over a type": ENDLESS,
    "lists that double": LISTS,
    "5 MB of one token": "{{ '<|endoftext|>' * 400000 }}",
    "escape: class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape: cycler": ESCAPE % "cycler.__init__",
    "escape: joiner": ESCAPE % "joiner.__init__",
    "escape: namespace": ESCAPE % "namespace.__init__",
    "escape: lipsum": ESCAPE % "lipsum",
    "escape: raise_exception": ESCAPE % "raise_exception",
    "escape: strftime_now": ESCAPE % "strftime_now",
    "escape: self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context }}",
    "escape: attr": "{{ ('' | attr('__class__')).mro() }}",
    "escape: format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "escape: format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "escape: map attr": "{{ ['']|map(attribute='__class__')|list }}",
    "escape: loop": "{% for a in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "escape: macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "escape: generator": "{{ (messages | map('string')).gi_frame.f_globals }}",
    "escape: namespace attribute": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
}
CASES = {"plain": PLAIN, **HOSTILE}
LATE = (
    "a loop without end",
    "a string of GB",
    "a macro that calls itself",
    "division by zero",
    "import",
    "include",
    "half a surrogate pair",
    "64 MB of text",
    "raises",
    "escape: class",
)
CASES |= {f"on boom: {name}": on_boom(HOSTILE[name]) for name in LATE}


def serve(folder: Path, template: Path, canary: Path) -> str:
    args = ServeArgs(model=str(folder), served_model_name="m", chat_template=str(template))
    check_model(args, runs_here=True)
    server = Server(args)

    def post(path: str, **body: object) -> tuple[int, str]:
        body = {"model": "m", "max_tokens": 4, "temperature": 0, **body}
        answer = call(server, "POST", path, headers={}, json=body)
        if answer.status_code == 200:
            choice = answer.json()["choices"][0]
            return 200, choice.get("text") or str(choice.get("message"))
        return answer.status_code, answer.json()["error"]["message"]

    before = post("/v1/completions", prompt="a")
    found = []
    for content in ("a", "boom") if "boom" in template.read_text() else ("a",):
        messages = [{"role": "user", "content": content}]
        status, text = post("/v1/chat/completions", messages=messages)
        assert status in (200, 400) and (status == 200 or "\n" not in text), (status, text)
        found.append("200" if status == 200 else f"400 {text}")
    assert post("/v1/completions", prompt="a") == before, "the server is not what it was"
    assert not canary.exists(), "a template ran a command"
    server.close()
    return " | ".join(found)


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    faults = []
    with scratch() as space:
        write_random_model(space / "m")
        canary, template = space / "canary", space / "template.jinja"
        for name in names:
            template.write_text(CASES[name].replace("CANARY", str(canary)))
            if report(name, bounded(partial(serve, space / "m", template, canary))):
                faults.append(name)
        if canary.exists():
            faults.append("a file appeared")
        shutil.rmtree(space / "m")
    finish("hostile chat templates", faults, len(names))


if __name__ == "__main__":
    main()
