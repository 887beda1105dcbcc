"""The ``data`` section of runs on pairs of texts."""

from typing import ClassVar, Literal

from pydantic import Field

from .tokens import TokensConfig


class PairsConfig(TokensConfig):
    """Pairs of a source and a target text, in JSON objects or CSV files: for encoder-decoders."""

    measures: ClassVar[dict[str, str]] = {
        "eval_accuracy": "Share of held-out target tokens that were found likeliest",
    }
    batch_is: ClassVar[str] = "{batch} pairs of texts of up to {length} tokens"

    format: Literal["pairs"] = "pairs"
    """The model reads each source and learns to write its target."""
    source: str
    """A file of JSON objects (``.jsonl``, ``.ndjson``, ``.json``: one a line, or a list), a
    ``.csv`` table, or a folder of these."""
    eval_source: str | None = None
    """Held-out pairs of the same kinds; None holds out ``eval_fraction`` of ``source``."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of ``source`` held out: every n-th pair."""
    source_key: str = "source"
    """Key or column of what is read."""
    target_key: str = "target"
    """Key or column of what should be written."""
