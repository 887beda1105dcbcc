"""Tokenizers that tokenizer.json says everything about, opened without transformers.

transformers takes 25 MB and a second to import, and for such a folder it gives the same ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .json_file import read_json

CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The classes of transformers that take tokenizer.json as it is; others build their own."""
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
WITHOUT_EFFECT = ("tokenizer_class", "clean_up_tokenization_spaces", "chat_template")
"""Settings of tokenizer_config.json that change no ids, given what :func:`open_plain` checks."""
MORE_SETTINGS = ("special_tokens_map.json", "added_tokens.json")


class PlainTokenizer:
    """A tokenizer.json, with what a prompt and its answer need."""

    cls_token_id: int | None = None
    sep_token_id: int | None = None

    def __init__(
        self, rust: Tokenizer, eos_token: str | None, bos_token: str | None = None
    ) -> None:
        self._rust = rust
        self.eos_token = eos_token
        self.eos_token_id = None if eos_token is None else rust.token_to_id(eos_token)
        self.bos_token_id = None if bos_token is None else rust.token_to_id(bos_token)

    def encode(self, text: str) -> list[int]:
        """Return ids, with those that the tokenizer puts around every text."""
        return list(self._rust.encode(text).ids)

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts alone, with nothing around them."""
        return [list(one.ids) for one in self._rust.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._rust.decode(ids, skip_special_tokens=True))


def open_plain(folder: Path) -> PlainTokenizer | None:
    """Open a folder's tokenizer; None if only transformers can say how it reads text.

    The caller has checked the sizes of the files. Raises errors of the tokenizer library.
    """
    if any((folder / name).exists() for name in MORE_SETTINGS):
        return None
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")]
    if not all(path.is_file() for path in files):
        return None
    settings, config = read_json(files[1]), read_json(files[2])
    # Folders of some versions of transformers get their pattern of words replaced.
    if not _is_plain(settings) or "transformers_version" in config:
        return None
    rust = Tokenizer.from_file(str(files[0]))
    special = {t.content for t in rust.get_added_tokens_decoder().values() if t.special}
    named = {settings[name] for name in SPECIAL if settings.get(name) is not None}
    if not named <= special or rust.truncation is not None or rust.padding is not None:
        return None
    return PlainTokenizer(rust, settings.get("eos_token"), settings.get("bos_token"))


def _is_plain(settings: dict[str, Any]) -> bool:
    if settings.get("tokenizer_class") not in CLASSES:
        return False
    if settings.get("clean_up_tokenization_spaces") is not False:
        return False
    if not all(isinstance(settings.get(name, ""), str | None) for name in SPECIAL):
        return False
    return settings.keys() <= {*SPECIAL, *WITHOUT_EFFECT}
