"""Render chat templates in a process that can be ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import process as template_process

KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "LANG", "TZ")
"""What the process sees of the environment; a server's key is in there too."""


class TemplateFault(Exception):  # noqa: N818 - becomes an error of the configuration or a request
    """A template that could not be rendered, with the reason in a few words."""

    def __init__(
        self, kind: Literal["syntax", "refusal", "failure", "ended", "unavailable"], reason: str
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        """``syntax``: no Jinja. ``refusal``: it does not want these messages. ``ended``: it had to
        be ended, or ended its process. ``unavailable``: the process is to blame, not the template.
        ``failure``: else."""


@dataclass(frozen=True, slots=True)
class Chat:
    """What a template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    """Whether the text ends where the assistant's next answer begins."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template made of a conversation."""

    text: str
    answers: list[tuple[int, int]]
    """Where the parts begin and end that it marks by ``{% generation %}``."""


class TemplateProcess:
    """Renders with transformers' Jinja sandbox; one thread at a time may use it.

    Starts with the first job and again after a job that was ended. Ends with this process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TemplateProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(
        self, template: str, messages: list[dict[str, Any]], special_tokens: dict[str, Any]
    ) -> str:
        """Return the text of a conversation, ready for the answer; errors as :meth:`render_all`."""
        return self.render_all(template, [Chat(messages)], special_tokens)[0].text

    def render_all(
        self,
        template: str,
        chats: list[Chat],
        special_tokens: dict[str, Any],
        has_tags: bool = False,
    ) -> list[Rendered]:
        """Return the texts of some conversations; ``has_tags`` asks for their marked answers, too.

        Raises :class:`TemplateFault`, also for what takes too long or too much memory.
        """
        job = {
            "template": template,
            "chats": [{name: getattr(chat, name) for name in Chat.__slots__} for chat in chats],
            "special_tokens": special_tokens,
            "has_tags": has_tags,
        }
        try:
            line = json.dumps(job, default=str).encode()
        except RecursionError:
            raise TemplateFault("failure", "they are nested too deeply") from None
        lines = self._exchange(line, len(chats))
        return [_read(line) for line in lines]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, job: bytes, num_results: int) -> Iterator[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._process = _start()
        assert process.stdin is not None and process.stdout is not None, "pipes were asked for"
        try:
            process.stdin.write(job + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and the empty answer says so
        for _ in range(num_results):
            line = process.stdout.readline()
            if not line:
                self._process = None
                raise _reason(process)
            yield line


def _read(line: bytes) -> Rendered:
    result = json.loads(line)
    if "text" not in result:
        raise TemplateFault(result["kind"], result["reason"])
    return Rendered(result["text"], [(first, last) for first, last in result["answers"]])


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        # -P: its own folder holds modules of ours whose names others may look for.
        [sys.executable, "-P", str(Path(template_process.__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        start_new_session=True,  # Ctrl-C is for the server, which finishes what it has
    )
    assert process.stdout is not None, "a pipe was asked for"
    if process.stdout.readline() != template_process.READY:
        process.kill()
        process.communicate()
        raise _unavailable("could not start")
    return process


def _reason(process: subprocess.Popen[bytes]) -> TemplateFault:
    """Say why a process has ended during a job."""
    process.communicate()
    code = process.returncode
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        limit = template_process.CPU_LIMIT_S
        return TemplateFault("ended", f"it has not ended after {limit} s of computing")
    if code == -signal.SIGKILL:  # nothing that a template does
        return _unavailable("was ended from outside")
    return TemplateFault("ended", f"it has ended its process (exit code {code})")


def _unavailable(what: str) -> TemplateFault:
    return TemplateFault("unavailable", f"the process that renders chat templates {what}")
