"""The lossy ways in which a model runs, each with its price.

A way that was not measured says so. moe/folders/prices.py keeps the prices.
"""

from collections.abc import Iterable
from pathlib import Path

from ...moe.folders.folder import ModelFolder
from ...moe.folders.group_sparse_format import NAME as INT4_SPARSE
from ...moe.folders.group_sparse_format import GroupSparseFormat, StoredFormat
from ...moe.folders.prices import read_prices
from ..experts.options import StoreOptions
from ..experts.sparsity import EXACT, read_sparsity


def lossy_modes(folder: ModelFolder, options: StoreOptions) -> list[str]:
    """Return the names of the lossy ways in which a folder runs with these options."""
    kinds = folder.formats.kinds
    modes = ["mixed"] if len(kinds) > 1 else [_name(packed) for packed in kinds if packed]
    if options.sparsity not in (None, EXACT):
        modes.append(read_sparsity(options.sparsity).name)
    return modes


def _name(packed: StoredFormat) -> str:
    return INT4_SPARSE if isinstance(packed, GroupSparseFormat) else f"int{packed.bits}"


def lossy_sentences(folder: Path, modes: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each mode: its price, or that there is none."""
    prices = read_prices(folder)
    return tuple(
        prices[mode].sentence() if mode in prices else f"{mode} is lossy; its price is not known."
        for mode in modes
    )
