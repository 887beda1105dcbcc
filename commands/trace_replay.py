"""``moeyard trace replay``: what cache policies and predictors would cost on recorded routes."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import Parsers, add_command, add_route_files

if TYPE_CHECKING:
    from ..moe.routes.format import RouteHeader
    from ..serving.experts.recorded import RecordedForward
    from ..serving.experts.replay.comparison import Comparison, Outcome
    from ..serving.experts.replay.run import Pace

LEGEND = """\
misses: experts whose read began when they were needed; late: those on their way by then
useful, wasted: read ahead and in memory when needed; put out or cancelled before
no_miss: share of the tokens whose forward waited for no expert
gap: misses and late ones over the misses of belady, which knows the future and reads on demand
"""
COUNTED = ("hits", "misses", "late", "issued", "useful", "wasted", "evictions", "bytes_read")
"""What a log and its routes say."""
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def add(kinds: Parsers) -> None:
    """Add the command."""
    command = add_command(
        kinds, "replay", "run recorded routes through caches of experts with other settings"
    )
    add_route_files(command)
    command.add_argument(
        "--slots",
        nargs="+",
        default=["10%", "25%", "50%"],
        metavar="N",
        help="experts in memory, a number or a share of all; default: 10%% 25%% 50%%",
    )
    command.add_argument(
        "--policies",
        type=_names,
        default=["all"],
        metavar="NAME,...",
        help="policies to compare, NAME or NAME:FILE; all = every one, and belady",
    )
    command.add_argument(
        "--predictors",
        type=_names,
        default=["none"],
        metavar="NAME,...",
        help="what is read ahead: none; next_layer, which knows the next layer's choice; "
        "previous_token, previous_layers, activations or trained:FILE; default: none",
    )
    command.add_argument(
        "--bandwidth", metavar="SIZE/s", help="of the disk, such as 400MB/s, to replay time, too"
    )
    command.add_argument(
        "--layer-time", metavar="TIME", help="that a layer computes, such as 3ms; with --bandwidth"
    )
    command.add_argument("--expert-bytes", metavar="SIZE", help="of an expert, such as 9MiB")
    command.add_argument(
        "--held-out",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the forwards, the last ones, to judge by; what learns from a file learns from the "
        "others; 1 = replay all",
    )
    command.add_argument(
        "--log",
        type=Path,
        metavar="LOG",
        help="follow what --expert-log wrote in the run of these routes, and count again",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw each policy's gap")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each number of slots, policy and predictor; or what a log comes to."""
    from ..serving.experts.replay.comparison import Setting

    if arguments.log is not None:
        _follow(arguments)
        return
    comparison = _open(arguments)
    slot_bytes, pace = _pace(arguments)
    outcomes = [
        comparison.run(Setting(policy, predictor, num_slots), slot_bytes or 1, pace)
        for num_slots in [_slots(text, comparison.num_experts) for text in arguments.slots]
        for policy in comparison.policies(arguments.policies)
        for predictor in arguments.predictors
    ]
    facts = {
        "files": len(arguments.files),
        "experts": comparison.num_experts,
        "learned_forwards": len(comparison.learned),
        "forwards": len(comparison.judged),
        "tokens": outcomes[0].counters.tokens,
    }
    if arguments.json:
        values = [
            outcome.as_dict() | ({} if slot_bytes else {"bytes_read": None}) for outcome in outcomes
        ]
        sys.stdout.write(json.dumps({**facts, "outcomes": values}, indent=1) + "\n")
    else:
        text = " ".join(f"{name}={value}" for name, value in facts.items())
        sys.stdout.write(f"replayed {text}\n{_table(outcomes, slot_bytes, pace)}{LEGEND}")
    if arguments.plot is not None:
        _plot(arguments.plot, outcomes, f"{facts['forwards']} forwards, {facts['experts']} experts")


def _follow(arguments: argparse.Namespace) -> None:
    """Print what the store of a run counted, by its log and its routes."""
    from ..serving.experts.replay.follow import LogFile, follow

    log = LogFile(arguments.log)
    header, forwards, is_whole = _read(arguments.files)
    if log.header.architecture != header.model.architecture:
        raise ConfigError(
            f"{log.path} is of a model with architecture {log.header.architecture}, and the routes "
            f"of one with {header.model.architecture}; give the log and the routes of one run."
        )
    counters = follow(log, forwards, is_whole).as_dict()
    if log.damage is not None:
        sys.stderr.write(f"warning: {log.damage}\n")
    found = {"policy": log.header.policy, "slots": log.header.num_slots}
    found |= {name: counters[name] for name in COUNTED}
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    facts = " ".join(f"{name}={value}" for name, value in found.items())
    sys.stdout.write(f"followed {facts}\n")


def _read(paths: list[Path]) -> "tuple[RouteHeader, list[RecordedForward], bool]":
    """Return the header, the forwards and whether all files are whole."""
    from ..moe.routes.reader import route_files
    from ..serving.experts.recorded import read_forwards

    files = route_files(paths)
    forwards = read_forwards(files)
    damages = [file.damage for file in files if file.damage is not None]
    for damage in damages:
        sys.stderr.write(f"warning: {damage}\n")
    return files[0].header, forwards, not damages


def _open(arguments: argparse.Namespace) -> "Comparison":
    from ..serving.experts.replay.comparison import Comparison

    for path in arguments.files:
        if (path / "config.json").exists():
            raise ConfigError(
                f"{path} is a model; give route files, or let the model read recorded texts again "
                "with moeyard trace compare MODEL FILE."
            )
    if arguments.predictors != ["none"] and arguments.bandwidth is None:
        raise ConfigError(
            "--predictors needs to know the time that reads have; give --bandwidth, --layer-time "
            "and --expert-bytes."
        )
    if arguments.plot is not None and arguments.plot.suffix != ".svg":
        raise ConfigError(f"--plot is {arguments.plot}; give a file that ends in .svg.")
    header, forwards, _ = _read(arguments.files)
    comparison = Comparison(header, forwards, arguments.held_out)
    for name in arguments.predictors:
        comparison.check_predictor(name)
    return comparison


def _pace(arguments: argparse.Namespace) -> tuple[int | None, "Pace | None"]:
    """Return the bytes of an expert and the pace, None where they are not given."""
    from ..serving.experts.budget import parse_budget
    from ..serving.experts.replay.run import Pace

    slot_bytes = None
    if arguments.expert_bytes is not None:
        slot_bytes = parse_budget(arguments.expert_bytes, 0, "--expert-bytes")
    if arguments.bandwidth is None and arguments.layer_time is None:
        return slot_bytes, None
    if None in (arguments.bandwidth, arguments.layer_time, slot_bytes):
        raise ConfigError(
            "a replay of time needs --bandwidth, --layer-time and --expert-bytes; give all three."
        )
    assert slot_bytes is not None
    bandwidth = parse_budget(arguments.bandwidth.removesuffix("/s"), 0, "--bandwidth")
    return slot_bytes, Pace.of(bandwidth, slot_bytes, _seconds(arguments.layer_time))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*", text)
    if match is None:
        raise ConfigError(f"--layer-time is {text!r}; write a time like 3ms, 800us or 0.1s.")
    return float(match.group(1)) * TIMES[match.group(2)]


def _slots(text: str, num_experts: int) -> int:
    """Return a number of slots from one, or from a share of all experts."""
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", text)
    number = int(text) if re.fullmatch(r"\d{1,9}", text) else None
    if share is not None and 0 < float(share.group(1)) <= 100:
        number = max(1, int(num_experts * float(share.group(1)) / 100))
    if not number:
        raise ConfigError(f"--slots has {text!r}; write a number above 0, or a share like 25%.")
    return min(number, num_experts)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _table(outcomes: "list[Outcome]", slot_bytes: int | None, pace: "Pace | None") -> str:
    width = max(6, *(len(outcome.setting.policy) for outcome in outcomes))
    ahead = any(outcome.setting.predictor != "none" for outcome in outcomes)
    second = max(9, *(len(outcome.setting.predictor) for outcome in outcomes))
    head = f"{'slots':>6}  {'policy':<{width}}" + (f"  {'predictor':<{second}}" if ahead else "")
    head += f"  {'hits':>8} {'misses':>8}" + (f" {'late':>7} {'useful':>7} {'wasted':>7}" * ahead)
    head += f" {'MB':>9}" * (slot_bytes is not None) + f" {'stall_s':>8}" * (pace is not None)
    lines = [f"{head} {'no_miss':>7} {'gap':>6}"]
    for outcome in outcomes:
        setting, found = outcome.setting, outcome.counters
        line = f"{setting.num_slots:6}  {setting.policy:<{width}}"
        line += f"  {setting.predictor:<{second}}" * ahead + f"  {found.hits:8} {found.misses:8}"
        line += f" {found.late:7} {found.useful:7} {found.wasted:7}" * ahead
        line += f" {found.bytes_read / 1e6:9.1f}" * (slot_bytes is not None)
        line += f" {found.stall_s:8.2f}" * (pace is not None)
        no_miss = found.tokens_without_miss / max(1, found.tokens)
        lines.append(f"{line} {no_miss:7.1%} {outcome.gap:6.3f}")
    return "\n".join(lines) + "\n"


def _plot(path: Path, outcomes: "list[Outcome]", title: str) -> None:
    from ..serving.experts.replay.plot import plot

    try:
        path.write_text(plot(outcomes, title), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error.strerror}); give another file."
        ) from None
