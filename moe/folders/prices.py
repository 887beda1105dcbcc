"""What a lossy way to run a model costs: ``prices.json`` in its folder.

A way to run a model is lossy if its answers are not those of the weights that it was made from.
Each has a name and a measured price: perplexity, bytes of an expert and speed, next to those of
the exact model in the same run. Servers and commands say the price when they start.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import ModelFileError
from ...files import read_small_file, replace_text

FILE = "prices.json"
MAX_BYTES = 1 << 20


class Measured(BaseModel):
    """One way to run a model, measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float
    """Per token."""
    expert_bytes: float
    """Mean bytes that are read for an expert."""
    tokens_per_s: float | None = None
    """One answer at a time; None if it was not measured."""


class Price(BaseModel):
    """A lossy way to run a model, next to the exact one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: str
    """As it is written on the command line."""
    text: str
    """Name of the file that perplexity was measured on."""
    tokens: int
    exact: Measured
    lossy: Measured

    def sentence(self) -> str:
        """Return the price as one line for people."""
        loss = self.lossy.perplexity / self.exact.perplexity - 1
        share = self.lossy.expert_bytes / self.exact.expert_bytes
        text = (
            f"{self.mode} is lossy: perplexity {self.lossy.perplexity:.4g} instead of "
            f"{self.exact.perplexity:.4g} ({loss:+.1%}) on {self.tokens:,} tokens of {self.text}, "
            f"{share:.0%} of the bytes of an expert"
        )
        if self.exact.tokens_per_s and self.lossy.tokens_per_s:
            speed = self.lossy.tokens_per_s / self.exact.tokens_per_s
            text += f", {speed:.2f} times the speed"
        return text + "."


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prices: tuple[Price, ...] = ()


def read_prices(folder: Path) -> dict[str, Price]:
    """Return the prices in a model folder by mode, empty if there is no file.

    Raises :class:`ModelFileError` for a file that is not ours.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        found = _File.model_validate_json(read_small_file(path, MAX_BYTES))
    except (OSError, ValidationError):
        raise ModelFileError(
            f"{path} is not a file of prices; delete it, or measure again."
        ) from None
    return {price.mode: price for price in found.prices}


def save_price(folder: Path, price: Price) -> None:
    """Put a price into a model folder; it replaces that of the same mode."""
    prices = {**read_prices(folder), price.mode: price}
    values = _File(prices=tuple(prices.values())).model_dump()
    replace_text(folder / FILE, json.dumps(values, indent=1) + "\n")
