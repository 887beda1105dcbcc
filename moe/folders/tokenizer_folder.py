"""The files of a model folder's tokenizer: finding, opening and copying them."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from ...errors import ModelFileError
from ...files import check_small_file
from .json_file import read_json
from .tokenizer_errors import library_errors

TOKENIZER_JSON = "tokenizer.json"
VOCABULARY_FILES = (
    TOKENIZER_JSON,
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with one of these has a tokenizer; for others transformers makes up an empty one."""
CONFIG = "tokenizer_config.json"
SETTINGS_FILES = (
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"
"""A folder of Jinja files."""
READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Of the files that transformers looks for in a folder."""
MAX_BYTES = 64 << 20
"""Of one such file; the largest tokenizer.json in use has 33 MB."""
SAMPLE = "two words and 3 more"
"""Text that the vocabulary of any language model has."""
REMEDY = "save the tokenizer as tokenizer.json and put that into the folder"


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder has a tokenizer of any kind."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer, with its chat templates."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*VOCABULARY_FILES, *SETTINGS_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        (target / TEMPLATES).mkdir(exist_ok=True)
        for path in sorted((source / TEMPLATES).glob("*.jinja")):
            shutil.copyfile(path, target / TEMPLATES / path.name)


def open_folder_tokenizer(folder: Path) -> Any:
    """Open a folder's tokenizer with transformers, which runs none of the folder's code.

    Raises :class:`ModelFileError` if there is none, if a package is missing, or if transformers
    would make up a vocabulary or change the text.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder)
    is_guessed = not (folder / TOKENIZER_JSON).is_file()
    if is_guessed:
        _check_openable(folder)
    with library_errors(lambda reason: unusable(folder, reason)):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if is_guessed:
        _check_reads_text(folder, tokenizer)
    return tokenizer


def unusable(folder: Path, reason: str) -> ModelFileError:
    """Return the error of a tokenizer that the library cannot use."""
    return ModelFileError(
        f"{folder} has no usable tokenizer ({reason.rstrip('.: ')}); copy its files again, or add "
        "tokenizer.json."
    )


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer, and pipes, devices and giants before one is opened."""
    if not has_tokenizer(folder):
        raise ModelFileError(f"{folder} has no tokenizer; add tokenizer.json.")
    for path in (*folder.iterdir(), *(folder / TEMPLATES).glob("*")):
        if path.suffix in READ_SUFFIXES and not path.is_dir():
            try:
                check_small_file(path, MAX_BYTES)
            except OSError as error:
                raise unusable(folder, f"{path.name}: {error.strerror}") from None
    if (folder / CONFIG).exists():
        read_json(folder / CONFIG)


def _check_openable(folder: Path) -> None:
    """Refuse tokenizers that transformers would misread or that need a missing package."""
    if _has_code(folder):
        raise ModelFileError(
            f"{folder} has a tokenizer with its own Python code, which is not run; {REMEDY}."
        )
    for name in (name for name in VOCABULARY_FILES if name.endswith(".model")):
        if (folder / name).is_file():
            packages = ["sentencepiece", "google.protobuf"]
            if _is_tiktoken(folder / name):
                packages = ["tiktoken"]
            _check_packages(folder / name, packages)


def _has_code(folder: Path) -> bool:
    return (folder / CONFIG).exists() and bool(read_json(folder / CONFIG).get("auto_map"))


def _is_tiktoken(path: Path) -> bool:
    """Say whether a vocabulary is tiktoken's: each line a token in base64 and its rank."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", file.readline(4096)) is not None


def _check_packages(path: Path, packages: list[str]) -> None:
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        names = " ".join(name.removeprefix("google.") for name in missing)
        raise ModelFileError(
            f"{path} cannot be read without the Python package {names}; pip install {names}, or "
            f"{REMEDY}."
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def _check_reads_text(folder: Path, tokenizer: Any) -> None:
    """Check how text is read: without tokenizer.json transformers guesses the tokenizer's kind."""
    text = tokenizer.decode(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    if text.strip() != SAMPLE:
        raise ModelFileError(
            f"{folder} has a tokenizer whose files transformers does not understand (it reads "
            f"{SAMPLE!r} as {text[:40]!r}); {REMEDY}."
        )
