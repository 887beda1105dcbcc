"""The tokenizer of a model folder, with what a server needs of it."""

import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RequestError
from ..moe.tokenizer_folder import open_folder_tokenizer
from .chat_template import content_format_of, pick_template

WORD_START = "\u2581"
"""SentencePiece's sign for a space."""


class ServingTokenizer:
    """Text to ids, ids to text, conversations to ids, and the bytes of single tokens."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._inner = open_folder_tokenizer(folder)
        self._folder = folder
        self._template = pick_template(self._inner.chat_template, folder, chat_template)
        self._format = content_format_of(self._template)
        self._byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        self._is_byte_level = "ByteLevel" in repr(
            getattr(getattr(self._inner, "backend_tokenizer", None), "decoder", None)
        )
        if self._template is not None:
            self._check_template(str(chat_template or folder))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        ids = list(self._inner(text, verbose=False)["input_ids"])
        eos = self._inner.eos_token_id
        while ids and ids[-1] == eos and not text.endswith(str(self._inner.eos_token)):
            ids.pop()  # some tokenizers end every text; a prompt goes on
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._inner.decode(ids, skip_special_tokens=True))

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the ids of a conversation in the form the model knows, ready for its answer."""
        if self._template is None:
            raise RequestError(
                f"{self._folder.name} has no chat template; start the server with --chat-template "
                "FILE, or use /v1/completions.",
                param="messages",
            )
        from jinja2 import TemplateError

        try:
            text = self._render(messages)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(
                f"the model's chat template refuses these messages ({reason}); change them.",
                param="messages",
            ) from None
        return list(self._inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one id stands for; empty for an id without text."""
        piece = self._inner.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._inner.added_tokens_decoder:
            return str(piece).encode()
        if self._is_byte_level and all(symbol in self._byte_of for symbol in piece):
            return bytes(self._byte_of[symbol] for symbol in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(WORD_START, " ").encode()

    def token_name(self, token: int) -> str:
        """Return the text of one id; what is no text is spelled out, so that names differ."""
        spelled = self.token_bytes(token)
        if not spelled:
            return f"token_id:{token}"
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        messages = [self._format.word(message) for message in messages]
        # The template runs in transformers' Jinja sandbox.
        return str(
            self._inner.apply_chat_template(
                messages,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    def _check_template(self, source: str) -> None:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            self._render([{"role": "user", "content": "a"}])
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template of {source} is not Jinja (line {error.lineno}: "
                f"{error.message}); mend it."
            ) from None
        except TemplateError:
            pass  # it wants other messages than this one; what it says is for those who ask
