"""``moeyard items``: semantic ids of items from their embeddings."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from .options import Parsers, add_command

if TYPE_CHECKING:
    from ..moe.items.embeddings import Embeddings
    from ..moe.items.semantic_ids import Codebooks
    from ..moe.items.table import ItemTable

CODEBOOKS = "codebooks.safetensors"


def add(parsers: Parsers) -> None:
    """Add the command."""
    items = add_command(parsers, "items", "give items semantic ids, which models can generate")
    items.add_argument(
        "embeddings",
        type=Path,
        metavar="EMBEDDINGS",
        help=".npz or .safetensors with ids and embeddings",
    )
    items.add_argument("target", type=Path, metavar="OUT", help="folder to write")
    items.add_argument("--levels", type=int, default=3, metavar="L", help="codes of an item")
    items.add_argument("--codes", type=int, default=256, metavar="K", help="codes on each level")
    items.add_argument("--seed", type=int, default=0, help="seed of the clustering")
    items.add_argument(
        "--codebooks",
        type=Path,
        metavar="FOLDER",
        help="add items to those of a folder that this command wrote, by its codebooks; --levels, "
        "--codes and --seed are those of the folder",
    )
    items.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the folder."""
    from ..files import new_folder
    from ..moe.items.embeddings import read_embeddings
    from ..moe.items.semantic_ids import fit_codebooks
    from ..moe.items.table import FILE, ItemTable

    target: Path = arguments.target
    if target.exists():
        raise ConfigError(f"OUT is {str(target)!r}, which is there; give a new folder.")
    for name, value, least in (("levels", arguments.levels, 1), ("codes", arguments.codes, 2)):
        if value < least:
            raise ConfigError(f"--{name} is {value}; use a number from {least} upwards.")
    found = read_embeddings(arguments.embeddings)
    if arguments.codebooks is None:
        sizes = (arguments.levels, arguments.codes, arguments.seed)
        books, codes_NL = fit_codebooks(found.x_ND, *sizes)
        table = ItemTable(found.names, codes_NL, arguments.codes)
    else:
        books, table = _with_more(arguments.codebooks, found)
    with new_folder(target) as folder:
        books.save(folder / CODEBOOKS)
        (folder / FILE).write_text(table.text(), encoding="utf-8")
    ids = len(table.codes_NL.unique(dim=0))
    facts = f"items={len(table)} levels={table.num_levels} codes={table.num_codes} ids={ids}"
    sys.stderr.write(f"event=items {facts} folder={target}\n")


def _with_more(folder: Path, found: "Embeddings") -> "tuple[Codebooks, ItemTable]":
    """Return the codebooks of a folder, and its table with more items behind those it has."""
    import torch

    from ..moe.items.semantic_ids import read_codebooks
    from ..moe.items.table import ItemTable, open_table

    books, table = read_codebooks(folder / CODEBOOKS), open_table(folder, "--codebooks")
    if found.x_ND.shape[1] != books.width:
        raise DataError(
            f"embeddings have {found.x_ND.shape[1]} numbers, but the codebooks of {folder} are for "
            f"{books.width}; use the same kind of embedding."
        )
    known = [name for name in found.names if name in table.number]
    if known:
        raise DataError(
            f"the item {known[0]!r} has a semantic id in {folder} already; give new items only."
        )
    codes_NL = torch.cat([table.codes_NL, books.encode(found.x_ND)])
    return books, ItemTable((*table.names, *found.names), codes_NL, table.num_codes)
