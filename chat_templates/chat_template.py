"""Which chat template a server uses, and what it takes as a message's content.

A template that loops over a message's content wants parts; given a string it would loop over
characters and silently lose the text. Its syntax tree shows which it is, as in vLLM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from ..errors import ConfigError
from ..files import read_small_file

MAX_TEMPLATE_BYTES = 4 << 20
LIST_FILTERS = {"selectattr", "rejectattr", "select", "reject", "list", "default", "d"}
"""Filters that give a list's members, or some of them."""


def pick_template(
    known: str | dict[str, str] | None, folder: Path, given: str | None
) -> str | None:
    """Return the template to use, None where there is none.

    ``known`` are the folder's: one, or several by name, of which ``default`` is used. ``given`` is
    a Jinja file or one of the names.
    """
    named = known if isinstance(known, dict) else {}
    if given is not None:
        is_name = given in named and not Path(given).is_file()
        return named[given] if is_name else _read_template(Path(given), named)
    if not isinstance(known, dict):
        return known or None
    if not known:
        return None
    if "default" in known:
        return known["default"]
    raise ConfigError(
        f"{folder} has the chat templates {', '.join(sorted(known))} and no default; choose one "
        "with --chat-template NAME, or give a Jinja file."
    )


@dataclass(frozen=True, slots=True)
class ContentFormat:
    """What a template takes."""

    takes_text: bool = True
    takes_parts: bool = False

    def word(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its content, where it has one, as the template takes it."""
        content: str | list[dict[str, str]] | None = message.get("content")
        if isinstance(content, str) and not self.takes_text:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self.takes_parts:
            return {**message, "content": "".join(part["text"] for part in content)}
        return message


def content_format_of(template: str | None) -> ContentFormat:
    """Read a template; one that cannot be parsed takes text, and fails when it is used."""
    environment = Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(template or "")
    except (TemplateSyntaxError, RecursionError):
        return ContentFormat()
    found = _Expressions(tree)
    takes_parts = any(found.is_content(loop.iter) for loop in tree.find_all(nodes.For))
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name == "string"]
    return ContentFormat(not takes_parts or any(map(found.is_content, tests)), takes_parts)


class _GenerationTag(Extension):
    """transformers' ``{% generation %}``, which marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what is between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Expressions:
    """Which expressions of a template are the messages, one message, or a message's content."""

    def __init__(self, tree: nodes.Template) -> None:
        self._messages, self._message, self._content = {"messages"}, set[str](), set[str]()
        bindings = [*_bindings(tree)]
        size = -1
        while size != (size := sum(map(len, (self._messages, self._message, self._content)))):
            for name, value, is_loop in bindings:
                self._bind(name, value, is_loop)

    def _bind(self, name: str, value: nodes.Node, is_loop: bool) -> None:
        if self._is_messages(value):
            (self._message if is_loop else self._messages).add(name)
        elif not is_loop and self._is_message(value):
            self._message.add(name)
        elif not is_loop and self.is_content(value):
            self._content.add(name)

    def _is_messages(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Filter(node=nodes.Expr() as inner, name=name) if name in LIST_FILTERS:
                return self._is_messages(inner)
            case nodes.Getitem(node=inner, arg=nodes.Slice()):
                return self._is_messages(inner)
            case nodes.CondExpr(expr1=first, expr2=nodes.Expr() as second):
                return self._is_messages(first) or self._is_messages(second)
        return _name_of(node) in self._messages

    def _is_message(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Getitem(node=inner, arg=arg) if not isinstance(arg, nodes.Slice):
                return self._is_messages(inner)
            case nodes.Filter(node=nodes.Expr() as inner, name="first" | "last"):
                return self._is_messages(inner)
        return _name_of(node) in self._message

    def is_content(self, node: nodes.Node) -> bool:
        """Say whether an expression is a message's content, or the members of one."""
        match node:
            case nodes.Getattr(node=inner, attr="content"):
                return self._is_message(inner)
            case nodes.Getitem(node=inner, arg=nodes.Const(value="content")):
                return self._is_message(inner)
            case nodes.Call(
                node=nodes.Getattr(node=inner, attr="get"), args=[nodes.Const(value="content"), *_]
            ):
                return self._is_message(inner)
            case nodes.Filter(node=nodes.Expr() as inner, name=name) if name in LIST_FILTERS:
                return self.is_content(inner)
            case nodes.Or(left=first, right=second):
                return self.is_content(first) or self.is_content(second)
            case nodes.CondExpr(expr1=first, expr2=nodes.Expr() as second):
                return self.is_content(first) or self.is_content(second)
        return _name_of(node) in self._content


def _bindings(tree: nodes.Template) -> Iterable[tuple[str, nodes.Node, bool]]:
    """Yield (name, value, is loop): a name may stand for a value, or for each of its members."""
    for assign in tree.find_all(nodes.Assign):
        yield _name_of(assign.target), assign.node, False
    for loop in tree.find_all(nodes.For):
        yield _name_of(loop.target), loop.iter, True
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        macro = macros.get(_name_of(call.node))
        if macro is not None:
            for parameter, value in zip(macro.args, call.args, strict=False):
                yield parameter.name, value, False
            for keyword in call.kwargs:
                yield keyword.key, keyword.value, False


def _name_of(node: nodes.Node) -> str:
    """Return a variable's name, ``ns.name`` for one of a namespace, '' for anything else."""
    match node:
        case nodes.Name(name=name):
            return str(name)
        case nodes.NSRef(name=name, attr=attr):
            return f"{name}.{attr}"
        case nodes.Getattr(node=nodes.Name(name=name), attr=attr):
            return f"{name}.{attr}"
    return ""


def _read_template(path: Path, named: dict[str, str]) -> str:
    try:
        return read_small_file(path, MAX_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        names = f" or one of {', '.join(sorted(named))}" if named else ""
        raise ConfigError(
            f"chat-template {path} cannot be read ({reason}); give a Jinja file{names}."
        ) from None
