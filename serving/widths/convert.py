"""``moeyard convert --dtype mixed``: experts of 8 and 4 bits within a tolerated perplexity."""

import gc
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from ...errors import ConfigError, DataError, ModelFileError
from ...moe.folders.convert import convert
from ...moe.folders.folder import ModelFolder
from ...moe.folders.hub import local_folder
from ...moe.folders.prices import Measured, Price, save_price
from ...moe.folders.write_few_bits import choose_format
from ...moe.models.language_model import LanguageModel
from ..experts.pools import pool_sizes
from ..loading import open_model
from .tolerance import WidthSearch
from .weights import NARROW, WIDE

FEWEST_TOKENS = 1024
"""Of a calibration text."""
ROWS_OF_EXPERT = 32
"""Rows that a calibration text must have for an expert on average."""


@dataclass(frozen=True, slots=True)
class MixedFolder:
    """What was written."""

    num_wide: int
    num_narrow: int
    expert_bytes: int
    """Of all experts together, in memory and in the folder."""
    perplexity: float
    """On the calibration text, as that of the exact model is."""
    exact_perplexity: float
    tokens: int

    def sentence(self) -> str:
        """Return the result as one line for people."""
        return (
            f"widths: {self.num_wide} int{WIDE}, {self.num_narrow} int{NARROW}, "
            f"{self.expert_bytes} bytes of experts, perplexity {self.perplexity:.5g} instead of "
            f"{self.exact_perplexity:.5g} on {self.tokens} tokens of calibration"
        )


def convert_mixed(
    source: str | Path,
    target: Path,
    calibration: Path,
    tolerance: float = 0.01,
    ignore_unused_weights: bool = False,
) -> MixedFolder:
    """Write a model with experts of 8 and 4 bits to folder ``target``.

    As many experts as possible get 4 bits, the least important first, while the perplexity on the
    text ``calibration`` stays within ``1 + tolerance`` of the exact model's. If that is all or none
    of them, the folder is that of ``int4`` or ``int8``. The model must fit into memory, together
    with its experts in 8 and in 4 bits.

    Raises :class:`ConfigError` for a model without experts, a tolerance below 0 or one that not
    even int8 meets, :class:`DataError` for a calibration text that is too short or cannot be read,
    and :class:`ModelFileError` for a model whose experts are quantized already. Nothing is written
    then.
    """
    if not 0 <= tolerance < inf:
        raise ConfigError(f"tolerance is {tolerance}; use 0 or more, such as 0.01 for 1 %.")
    if target.exists():
        raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
    text = _read(calibration)
    source = local_folder(source)
    dtype = _check_source(source)
    model, _ = open_model(source, dtype, ignore_unused_weights=ignore_unused_weights)
    ids_T = _ids(model, text, calibration)
    search = WidthSearch(model, text, ids_T)
    chosen, order, exact = search.within(tolerance), search.order, search.exact
    del model, search
    gc.collect()
    narrow = set(order[: chosen.num_narrow])
    if 0 < len(narrow) < len(order):
        bits_of = {key: NARROW if key in narrow else WIDE for key in order}
        convert(source, target, None, ignore_unused_weights, bits_of)
    else:
        convert(source, target, f"int{NARROW if narrow else WIDE}", ignore_unused_weights)
    found = MixedFolder(
        num_wide=len(order) - len(narrow),
        num_narrow=len(narrow),
        expert_bytes=_expert_bytes(target),
        perplexity=chosen.perplexity,
        exact_perplexity=exact,
        tokens=ids_T.numel() - 1,
    )
    _save_price(source, target, calibration, found)
    return found


def _check_source(source: Path) -> torch.dtype:
    """Return the type of the source's weights."""
    folder = ModelFolder(source)
    try:
        if folder.config.moe is None:
            raise ConfigError("dtype is mixed, but the model has no experts; use bf16 or fp32.")
        if folder.formats.kinds != (None,):
            raise ModelFileError(
                f"{source} has experts in few bits already; give the model that it was made from."
            )
        for bits in (WIDE, NARROW):
            choose_format(folder.config, bits)
        return folder.dtype
    finally:
        folder.close()


def _read(calibration: Path) -> str:
    try:
        return calibration.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"calibration is {str(calibration)!r}, which cannot be read ({reason}); give a text."
        ) from None


def _ids(model: LanguageModel, text: str, calibration: Path) -> torch.Tensor:
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    moe = model.config.moe
    assert moe is not None, "the source was checked"
    needed = max(FEWEST_TOKENS, ROWS_OF_EXPERT * moe.num_experts // moe.router.k)
    if len(ids) <= needed:
        raise DataError(
            f"calibration is {str(calibration)!r}, which has {len(ids)} tokens; give a text of "
            f"more than {needed}."
        )
    return torch.tensor(ids, dtype=torch.int64)


def _expert_bytes(folder: Path) -> int:
    files = ModelFolder(folder)
    try:
        return sum(size.num_experts * size.slot_bytes for size in pool_sizes(files, files.dtype))
    finally:
        files.close()


def _save_price(source: Path, target: Path, calibration: Path, found: MixedFolder) -> None:
    """Tell servers what the folder costs."""
    number = found.num_wide + found.num_narrow
    mode = (
        "mixed"
        if found.num_wide and found.num_narrow
        else (f"int{NARROW if found.num_narrow else WIDE}")
    )
    exact = Measured(perplexity=found.exact_perplexity, expert_bytes=_expert_bytes(source) / number)
    lossy = Measured(perplexity=found.perplexity, expert_bytes=found.expert_bytes / number)
    price = Price(mode=mode, text=calibration.name, tokens=found.tokens, exact=exact, lossy=lossy)
    save_price(target, price)
