"""What commands share: how their help looks, options of several, errors as one sentence."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..dtypes import short_name
from ..errors import ConfigError, DataError, MoeyardError, Stopped

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
INTERRUPTED = 130


class HelpFormatter(argparse.HelpFormatter):
    """Adds ``default: X`` where a help text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        if text and has_default and action.option_strings and "default" not in text:
            return f"{text}; default: %(default)s"
        return text


def report_errors(work: Callable[[], int | None]) -> int:
    """Do ``work``; print an error as one sentence and return the exit status."""
    try:
        status = work()
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return INTERRUPTED
    except MoeyardError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status or 0


def add_command(parsers: Parsers, name: str, text: str) -> argparse.ArgumentParser:
    """Add the parser of a command; ``text`` begins with a verb and has no full stop."""
    return parsers.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=HelpFormatter
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model to open."""
    parser.add_argument(
        "model", metavar="MODEL", help="a model folder, a run's folder, or OWNER/MODEL of the hub"
    )


def add_route_files(parser: argparse.ArgumentParser) -> None:
    """Add the route files to read."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="route files, or folders of them such as RUN_DIR/routes",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add how a model is opened in this process."""
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    add_expert_store(parser)
    add_ignore_unused_weights(parser)
    add_allow_code(parser)


def add_expert_store(parser: argparse.ArgumentParser) -> None:
    """Add how much memory experts get, and how the others are read from disk."""
    parser.add_argument(
        "--expert-memory",
        help="memory for experts: 2GiB, 25%% or auto, what the machine can spare; default: all",
    )
    parser.add_argument(
        "--expert-policy",
        metavar="NAME",
        default="decayed_lfu",
        help="which expert leaves memory when another one is needed: lru, lfu, decayed_lfu, "
        "edgemoe, activations, working_set, hot_set:FILE or future_use:FILE",
    )
    parser.add_argument(
        "--expert-reader",
        choices=("auto", "buffered", "direct"),
        default="auto",
        help="through the page cache, around it, or what a probe at the start finds better",
    )
    parser.add_argument(
        "--expert-sparsity",
        metavar="FILE",
        help="do not read channels of experts that a file of moeyard sparsity takes for 0 (lossy), "
        "that a prompt uses least (coreinfer:SHARE, lossy), or that gates make 0 (exact)",
    )
    parser.add_argument(
        "--expert-log",
        metavar="FILE",
        help="write what happens to experts into FILE, for moeyard trace replay; serve takes a "
        "folder, with a file for each replica",
    )
    parser.add_argument(
        "--expert-predictor",
        metavar="NAME[:FILE]",
        default="none",
        help="what is read ahead before routers have chosen: auto, none, next_gates, "
        "fitted_gates:FILE, previous_layers, activations, previous_token or trained:FILE",
    )
    _add_fallback(parser)


def _add_fallback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expert-fallback",
        metavar="FOLDER",
        help="lossy: compute experts that are not in memory from FOLDER, the same model in int8 or "
        "int4, which is kept in memory, instead of waiting for them",
    )
    parser.add_argument(
        "--expert-fallback-above",
        type=float,
        metavar="W",
        help="wait all the same for experts that have more than this share of the rows' weights; "
        "0 waits for all; default: for none",
    )


def add_correction(parser: argparse.ArgumentParser) -> None:
    """Add how the answers of a lossy model are corrected."""
    parser.add_argument(
        "--expert-correction",
        type=int,
        metavar="N",
        help="let the exact model check windows of N tokens that --expert-fallback proposes, so "
        "that the answer is its own; default: no check",
    )
    parser.add_argument(
        "--expert-correction-threshold",
        type=float,
        metavar="P",
        help="lossy: accept tokens from this probability on (0.1), in greedy answers; default: "
        "only the exact model's own",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add which adapters a server has, and who may change them."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter folder that requests name as their model; repeat for several",
    )
    parser.add_argument(
        "--allow-lora-updates",
        action="store_true",
        help="let clients with the key load and unload adapters from folders of this machine",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the type that weights are loaded in."""
    parser.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16"),
        help="float32 and bfloat16 work, too; default: as stored",
    )


def add_kv_memory(parser: argparse.ArgumentParser) -> None:
    """Add what a server keeps for keys and values, and in which type."""
    parser.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="memory for keys and values: 2GiB, or 50%% of what a full batch of the longest texts "
        "takes; default: as much as that, if it is free",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("int8",),
        help="lossy: round keys and values to int8; default: the model's type",
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add how an answer is drawn."""
    folders = "default: the model's generation_config.json"
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="longest answer in tokens"
    )
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest; {folders}")
    parser.add_argument("--top-p", type=float, help=f"probability mass to draw from; {folders}")
    parser.add_argument("--top-k", type=int, help=f"tokens to draw from, 0 = all; {folders}")
    parser.add_argument("--seed", type=int, help="of the draws; default: another each time")


def add_ignore_unused_weights(parser: argparse.ArgumentParser) -> None:
    """Add ``--ignore-unused-weights``."""
    parser.add_argument(
        "--ignore-unused-weights",
        action="store_true",
        help="skip weights that config.json does not ask for, instead of refusing the folder",
    )


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-code``."""
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="MODULE",
        help="permit and import your own module with routers; repeat for several modules",
    )


def read_text(path: Path, option: str = "--text") -> str:
    """Return the text that ``option`` names; raises :class:`DataError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{option} is {str(path)!r}, which cannot be read ({reason}).") from None


def cannot_write(option: str, path: Path, error: OSError) -> ConfigError:
    """Return the error of a command whose ``option`` names a file that cannot be written."""
    return ConfigError(
        f"{option} is {str(path)!r}, which cannot be written ({error.strerror}); choose another."
    )
