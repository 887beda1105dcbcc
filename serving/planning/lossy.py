"""The lossy ways in which a model runs, each with its price.

A way that was not measured says so. moe/folders/prices.py keeps the prices.
"""

from collections.abc import Iterable
from pathlib import Path

from ...moe.folders.folder import ModelFolder
from ...moe.folders.group_sparse_format import NAME as INT4_SPARSE
from ...moe.folders.group_sparse_format import GroupSparseFormat, StoredFormat
from ...moe.folders.hub import local_folder
from ...moe.folders.prices import read_prices
from ...moe.folders.two_of_four_format import NAME as TWO_OF_FOUR
from ...moe.folders.two_of_four_format import TwoOfFourFormat
from ..experts.options import StoreOptions
from ..experts.sparsity import EXACT, read_sparsity

CORE_MODE = "expert-sparsity coreinfer"
WHOLE_PROMPTS = (
    " Each request reads its whole prompt, which decides which channels its answer uses: no "
    "prefixes are reused."
)


def lossy_modes(folder: ModelFolder, options: StoreOptions) -> list[str]:
    """Return the names of the lossy ways in which a folder runs with these options."""
    kinds = folder.formats.kinds
    modes = ["mixed"] if len(kinds) > 1 else [_name(packed) for packed in kinds if packed]
    modes = [mode for mode in modes if mode != TWO_OF_FOUR]  # which rounds nothing
    if options.sparsity not in (None, EXACT):
        modes.append(read_sparsity(options.sparsity).name)
    mode = _fallback_mode(options)
    return modes if mode is None else [*modes, mode]


def _name(packed: StoredFormat) -> str:
    if isinstance(packed, TwoOfFourFormat):
        return TWO_OF_FOUR
    return INT4_SPARSE if isinstance(packed, GroupSparseFormat) else f"int{packed.bits}"


def _fallback_mode(options: StoreOptions) -> str | None:
    """Return the name of copies in place of missing experts; None if nothing comes of them."""
    is_corrected = options.correction is not None and options.correction_threshold is None
    if options.fallback is None or is_corrected:  # the answer is the exact model's then
        return None
    copy = ModelFolder(local_folder(options.fallback))
    mode = f"expert-fallback {_name(copy.packed)}" if copy.packed else "expert-fallback"
    copy.close()
    if options.fallback_above is not None:
        mode += f" above {options.fallback_above:g}"
    if options.correction is not None:
        mode += f" correction {options.correction} threshold {options.correction_threshold:g}"
    return mode


def lossy_sentences(folder: Path, modes: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each mode: its price, or that there is none."""
    prices = read_prices(folder)
    return tuple(
        (prices[mode].sentence() if mode in prices else f"{mode} is lossy; its price is not known.")
        + (WHOLE_PROMPTS if mode.startswith(CORE_MODE) else "")
        for mode in modes
    )
