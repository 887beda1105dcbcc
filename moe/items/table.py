"""The items that a model knows, each with its semantic id.

N items, L levels, K codes per level.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...files import read_small_file
from .trie import Trie

FILE = "items.json"
"""Name of the table in checkpoints, exports and the folders of ``moeyard items``."""
LARGEST = 1 << 30
"""Bytes of a table at most."""


class ItemTable:
    """Items by name, with their codes and the token ids of these.

    Code c of level l is the token ``l * K + c``, and one token more begins every item. Items may
    share a semantic id. It then stands for them in the order of the table, so that one that is
    recommended twice gives two items.
    """

    def __init__(self, names: Sequence[str], codes_NL: Tensor, num_codes: int) -> None:
        assert len(names) == len(codes_NL), "a row of codes for each item"
        self.names = tuple(names)
        self.codes_NL = codes_NL
        self.num_codes = num_codes
        self.number = {name: number for number, name in enumerate(self.names)}
        """The place of each item in the table."""
        self.trie = Trie(codes_NL, num_codes)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_levels(self) -> int:
        """Codes of an item."""
        return self.codes_NL.shape[1]

    @property
    def begin(self) -> int:
        """The token that begins every item."""
        return self.num_levels * self.num_codes

    @property
    def vocabulary(self) -> int:
        """Number of tokens: the codes of all levels, and ``begin``."""
        return self.begin + 1

    def tokens(self, items_N: Tensor) -> Tensor:
        """Return the tokens of items given by their places, int64 ``[..., L]``."""
        return self.codes_NL[items_N] + self.num_codes * torch.arange(self.num_levels)

    def text(self) -> str:
        """Return the table as a JSON text, which :func:`read_table` reads."""
        codes = dict(zip(self.names, self.codes_NL.tolist(), strict=True))
        return json.dumps({"codes": self.num_codes, "items": codes}, ensure_ascii=False) + "\n"


def open_table(folder: Path, field: str) -> ItemTable:
    """Open the table of items of a folder; ``field`` is what names the folder."""
    path = folder / FILE
    try:
        text = read_small_file(path, LARGEST).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"{field} is {str(folder)!r}, whose {FILE} cannot be read ({reason}); give a folder "
            "that moeyard items wrote."
        ) from None
    return read_table(text, str(path))


def read_table(text: str, where: str) -> ItemTable:
    """Return the table of a JSON text; ``where`` names it in a :class:`DataError`."""
    problem = f"{where} is not a table of items; give one that moeyard items wrote."
    try:
        values = json.loads(text, object_pairs_hook=_without_copies)
    except (ValueError, RecursionError):
        raise DataError(problem) from None
    if not isinstance(values, dict) or not isinstance(values.get("items"), dict):
        raise DataError(problem)
    num_codes, codes = values.get("codes"), values["items"]
    if type(num_codes) is not int or not codes:
        raise DataError(problem)
    length = len(next(iter(codes.values()))) if isinstance(next(iter(codes.values())), list) else 0
    for name, found in codes.items():
        if not length or not _are_codes(found, length, num_codes):
            raise DataError(
                f"{where} gives the item {name!r} the codes {str(found)[:40]}; each item has the "
                f"same number of codes from 0 to {num_codes - 1}."
            )
    return ItemTable(tuple(codes), torch.tensor(list(codes.values())), num_codes)


def _without_copies(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary; raise ``ValueError`` for a name that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _are_codes(found: Any, length: int, num_codes: int) -> bool:
    return (
        isinstance(found, list)
        and len(found) == length
        and all(type(code) is int and 0 <= code < num_codes for code in found)
    )
