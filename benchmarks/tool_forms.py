"""What chat templates of published models write of calls of tools, and in which form.

Reads all ``.jinja`` files below a folder, such as ``vendor/llama.cpp/models/templates`` in the
source of llama-cpp-python: ``pip download --no-deps --no-binary :all: llama-cpp-python``.
"""

import argparse
import time
from pathlib import Path

from moeyard.chat_templates.chat_template import content_format_of
from moeyard.chat_templates.renderer import TemplateFault, TemplateProcess
from moeyard.chat_templates.tool_form import Message, ToolSupport, tool_support

NAMES = {"results": "results", "several": "several calls", "text": "text next to calls"}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    slowest = 0.0
    with TemplateProcess() as process:
        for path in sorted(folder.rglob("*.jinja")):
            found, duration_s = examine(process, path.read_text(encoding="utf-8"))
            slowest = max(slowest, duration_s)
            print(f"{path.stem}: {found}")
    print(f"the slowest took {slowest:.2f} s")


def examine(process: TemplateProcess, template: str) -> tuple[str, float]:
    """Return what a template takes, in words, and the seconds that it took to find out."""
    content = content_format_of(template)

    def render(messages: list[Message]) -> str:
        worded = [content.word(message) for message in messages]
        return process.render(template, worded, TOKENS)

    try:
        render([{"role": "user", "content": "a"}])
    except TemplateFault as fault:
        return f"no plain message ({fault})", 0.0
    start = time.perf_counter()
    support = tool_support(render)
    return in_words(support), time.perf_counter() - start


def in_words(support: ToolSupport) -> str:
    """Return what was found in words."""
    form, lacks = support.form, support.lacks
    if "calls" in lacks:
        return f"no calls ({lacks['calls']})"
    words = ["arguments as objects" if form.has_objects else "arguments as text"]
    if form.empty_content is None:
        words.append("content null")
    if form.has_short_ids:
        words.append("ids of nine characters")
    return ", ".join(words + [f"not {NAMES[name]} ({reason})" for name, reason in lacks.items()])


if __name__ == "__main__":
    main()
