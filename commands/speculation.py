"""Speculation as an option of commands."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..moe.drafts.tally import DraftCounts
    from ..moe.models.language_model import LanguageModel


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Add which drafter guesses next tokens, and how many rows it may use."""
    parser.add_argument(
        "--speculative",
        metavar="NAME",
        default="none",
        help="guess next tokens from the text so far and check several in one step: ngram or "
        "suffix; no answer changes; default: none",
    )
    parser.add_argument(
        "--speculative-rows",
        metavar="N",
        type=int,
        default=16,
        help="guessed tokens that one step checks at most, of all requests together",
    )


def check_speculation(arguments: argparse.Namespace, record_routes: Path | None = None) -> None:
    """Refuse a command's options that cannot work, before a model is opened."""
    from ..serving import speculating

    name, rows = arguments.speculative, arguments.speculative_rows
    copies = arguments.expert_fallback
    speculating.check_speculation(name, rows, arguments.device, copies, record_routes)


def speculate(model: "LanguageModel", arguments: argparse.Namespace) -> "DraftCounts":
    """Let a model speculate as a command's options say; return what counts its guesses."""
    from ..serving import speculating

    return speculating.speculate(model, arguments.speculative, arguments.speculative_rows)
