"""The program that renders chat templates: one job a line on stdin, one result a line on stdout.

A job is some conversations; it has a result for each in order and ends with the first fault.

A template is a program that came with the model folder. It may loop for ever or ask for any
memory, and a thread cannot be stopped; a process can, so the kernel ends this one at its limits.
Imports nothing of moeyard: torch would make it large, and slow to start again.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CPU_LIMIT_S = 2
"""Of computing, for one conversation. Not of the clock: a busy machine must not make good templates
fail. A short chat takes 0.1 ms and a megabyte of messages 16 ms (2 cores, AMD EPYC)."""
CLOCK_LIMIT_S = 60
"""For a conversation that does not compute and does not end either."""
MEMORY_BYTES = 256 << 20
"""Beyond what the process has before its first job."""
MAX_CHARACTERS = 4 << 20
"""Of a result: four times the largest body."""
READY = b"ready\n"

Render = Callable[..., tuple[list[str], list[Any]]]


def main() -> None:
    """Render until stdin ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    results = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # printed text is not a result
    _set_limits()
    results.write(READY)
    results.flush()
    for line in sys.stdin.buffer:
        for result in _results(render_jinja_template, line):
            results.write(result + b"\n")
            results.flush()


def _set_limits() -> None:
    """Bound the memory, forbid files to be written, and let the timers' signals end the process."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + MEMORY_BYTES
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _results(render: Render, line: bytes) -> Iterator[bytes]:
    try:
        job = json.loads(line)
        for chat in job["chats"]:
            yield _result(render, job, chat)
    except Exception as error:  # it is the template's, whatever it is
        yield _fault(*_describe(error))


def _result(render: Render, job: dict[str, Any], chat: dict[str, Any]) -> bytes:
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    signal.alarm(CLOCK_LIMIT_S)
    try:
        (text,), answers = render(
            conversations=[chat["messages"]],
            tools=chat["tools"],
            chat_template=job["template"],
            add_generation_prompt=chat["add_generation_prompt"],
            return_assistant_tokens_mask=job["has_tags"],
            **job["special_tokens"],
        )
        if len(text) > MAX_CHARACTERS:
            raise _UnfitTextError(f"it makes {len(text)} characters of them")
        if not _is_unicode(text):
            raise _UnfitTextError("it makes text that is not valid Unicode")
        return json.dumps({"text": text, "answers": answers[0] if answers else []}).encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


class _UnfitTextError(Exception):
    """Text that no one can use, with the reason."""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(error: Exception) -> tuple[str, str]:
    """Return the kind of a fault, and its reason."""
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return "syntax", f"line {error.lineno}: {error.message}"
    if isinstance(error, TemplateError):
        return "refusal", str(error)
    if isinstance(error, MemoryError):
        return "failure", f"it needs more than {MEMORY_BYTES >> 20} MiB"
    if isinstance(error, RecursionError):
        return "failure", "it is nested too deeply"
    if isinstance(error, _UnfitTextError):
        return "failure", str(error)
    return "failure", f"{type(error).__name__}: {error}"


def _fault(kind: str, reason: str) -> bytes:
    return json.dumps({"kind": kind, "reason": " ".join(reason.split())[:200]}).encode()


if __name__ == "__main__":
    main()
