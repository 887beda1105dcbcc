"""The tokenizer of a model folder, with what a server needs of it."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ...chat_templates.chat_template import content_format_of, pick_template
from ...chat_templates.renderer import TemplateFault, TemplateProcess
from ...chat_templates.tool_form import ToolForm, ToolSupport, tool_support
from ...errors import ConfigError, RequestError
from ...moe.folders.text_codec import prompt_ids, without_end
from ...moe.folders.tokenizer_errors import library_errors
from ...moe.folders.tokenizer_folder import open_folder_tokenizer

RETRY_AFTER_S = 5
WORD_START = "\u2581"
"""SentencePiece's sign for a space."""


class ServingTokenizer:
    """Text to ids, ids to text, conversations to ids, and the bytes of single tokens."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._inner = open_folder_tokenizer(folder)
        self._rust = _behind(self._inner)
        self._folder = folder
        self._template = pick_template(self._inner.chat_template, folder, chat_template)
        self._format = content_format_of(self._template)
        self._added = frozenset(self._inner.added_tokens_decoder)
        self._byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        self._is_byte_level = "ByteLevel" in repr(
            getattr(getattr(self._inner, "backend_tokenizer", None), "decoder", None)
        )
        self._templates = TemplateProcess()
        self.rendering = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        """Renders templates one at a time. A slow template delays only chats, not the threads that
        all requests share."""
        self.tools = ToolSupport(ToolForm(), {})
        """Whether the template writes calls of tools and their results."""
        if self._template is not None:
            self._check_template(str(chat_template or folder))
            self.tools = tool_support(self._render)

    @property
    def has_template(self) -> bool:
        """Say whether conversations can be rendered."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt. For threads: others go on meanwhile."""
        with _failures_on("prompt"):
            if self._rust is None:
                return prompt_ids(self._inner, text)
            return without_end(self._inner, _ids(self._rust, text, True), text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        with library_errors(_cannot_spell):
            tokenizer = self._inner if self._rust is None else self._rust
            return str(tokenizer.decode(ids, skip_special_tokens=True))

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Return the text of a conversation in the form the model knows, ready for its answer.

        Messages have no key that is None, and calls of tools as :class:`ToolForm` wants them. For
        threads of :attr:`rendering`.
        """
        if self._template is None:
            raise RequestError(
                f"{self._folder.name} has no chat template; start the server with --chat-template "
                "FILE, or use /v1/completions.",
                param="messages",
            )
        try:
            return self._render(self.tools.form.word(messages))
        except TemplateFault as fault:
            if fault.kind == "unavailable":
                raise _unavailable(fault) from None
            verb = "refuses" if fault.kind == "refusal" else "fails on"
            raise RequestError(
                f"the model's chat template {verb} these messages ({fault}); change them.",
                param="messages",
            ) from None

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a rendered conversation. For threads, as :meth:`encode`."""
        with _failures_on("messages"):
            if self._rust is not None:
                return _ids(self._rust, text, False)
            return list(self._inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    def close(self) -> None:
        """End the process that renders."""
        self._templates.close()
        self.rendering.shutdown(wait=False, cancel_futures=True)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one id stands for; empty for an id without text."""
        piece = self._inner.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._added:
            return str(piece).encode()
        if self._is_byte_level and all(symbol in self._byte_of for symbol in piece):
            return bytes(self._byte_of[symbol] for symbol in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(WORD_START, " ").encode()

    def token_name(self, token: int) -> str:
        """Return the text of one id; bytes that are not text are spelled out as numbers."""
        spelled = self.token_bytes(token)
        if not spelled:
            return f"token_id:{token}"
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        assert self._template is not None, "there is a template"
        messages = [self._format.word(message) for message in messages]
        return self._templates.render(
            self._template, messages, dict(self._inner.special_tokens_map)
        )

    def _check_template(self, source: str) -> None:
        try:
            self._render([{"role": "user", "content": "a"}])
        except TemplateFault as fault:
            if fault.kind == "refusal":
                return  # it wants other messages than this one
            self.close()
            if fault.kind == "unavailable":
                raise _unavailable(fault) from None
            if fault.kind == "syntax":
                raise ConfigError(
                    f"the chat template of {source} is not Jinja ({fault}); correct it."
                ) from None
            raise ConfigError(
                f"the chat template of {source} fails on a plain message ({fault}); correct it, or "
                "give another with --chat-template."
            ) from None


def _behind(tokenizer: Any) -> Any:
    """Return the library's tokenizer that transformers' one only wraps, or None.

    The wrapper takes ten times as long to decode a token, and the lists that it makes of a prompt
    hold up all threads. Its subclasses, and those that clean up blanks, do more than wrap.
    """
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is not PreTrainedTokenizerFast or tokenizer.clean_up_tokenization_spaces:
        return None
    rust = tokenizer.backend_tokenizer
    # As the wrapper does for each text.
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = tokenizer.split_special_tokens
    return rust


def _ids(rust: Any, text: str, add_special_tokens: bool) -> list[int]:
    # A batch of one: ``encode`` would keep all other threads waiting until it is done.
    (encoding,) = rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


def _failures_on(param: str) -> AbstractContextManager[None]:
    return library_errors(
        lambda reason: RequestError(
            f"the model's tokenizer fails on this text ({reason}); change it.", param=param
        )
    )


def _unavailable(fault: TemplateFault) -> RequestError:
    return RequestError(
        f"{fault}; try again later.",
        code="unavailable",
        status=503,
        retry_after_s=RETRY_AFTER_S,
    )


def _cannot_spell(reason: str) -> RequestError:
    return RequestError(f"the model's tokenizer cannot decode the answer ({reason}).", status=500)
