"""``moeyard align``: rounds of preference alignment of a run on sessions (OneRec)."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration import apply_override, read_values, with_others
from ..errors import ConfigError, Stopped
from ..training.key_check import check_keys
from .options import Parsers, add_command

if TYPE_CHECKING:
    from ..training.alignment.reward import RewardModel
    from ..training.config import RunConfig
    from ..training.data.sessions import SessionsData
    from ..training.stop import StopRequest

REWARD, PAIRS, RUN = "reward.safetensors", "pairs.safetensors", "run"


def add(parsers: Parsers) -> None:
    """Add the command."""
    align = add_command(
        parsers,
        "align",
        "train a model of sessions further, to prefer what a reward model prefers",
    )
    align.add_argument(
        "source", type=Path, metavar="RUN_DIR", help="a finished run with data.format sessions"
    )
    align.add_argument(
        "target", type=Path, metavar="OUT", help="folder of the rounds; if it has some, go on"
    )
    align.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="keys to change for the rounds' runs"
    )
    align.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds in all")
    align.add_argument(
        "--share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="part of the training sessions that get a pair in a round",
    )
    align.add_argument(
        "--beams", type=int, default=128, metavar="N", help="sessions to pick a pair from"
    )
    align.set_defaults(run=run, others=[])


def run(arguments: argparse.Namespace) -> None:
    """Run the rounds that are not done."""
    for name, value, least in (("rounds", arguments.rounds, 1), ("beams", arguments.beams, 2)):
        if value < least:
            raise ConfigError(f"--{name} is {value}; use a number from {least} upwards.")
    if not 0 < arguments.share <= 1:
        raise ConfigError(f"--share is {arguments.share}; use a number above 0, at most 1.")
    file = arguments.source / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"RUN_DIR is {str(arguments.source)!r}, which is no run; give one.")
    values = read_values(file)
    data = values.get("data")
    if not isinstance(data, dict) or data.get("format") != "sessions":
        raise ConfigError(f"{arguments.source} is a run on other data than sessions; give another.")
    data["alignment"] = data.get("alignment") or {}  # a run has null there, for overrides no place
    for override in with_others(arguments.overrides, arguments.others):
        apply_override(values, override)
    check_keys(values)
    arguments.target.mkdir(parents=True, exist_ok=True)
    _run_rounds(arguments, values)


def _run_rounds(arguments: argparse.Namespace, values: dict[str, Any]) -> None:
    """Run one round after the other.

    Raises :class:`Stopped` if it is asked to stop before all have ended.
    """
    from ..training.stop import StopRequest

    stop = StopRequest()
    stop.listen()
    before: Path = arguments.source
    for number in range(1, arguments.rounds + 1):
        if stop.signal_name is not None:
            raise _stopped(arguments, f"before round {number}")
        folder = arguments.target / f"round-{number}"
        folder.mkdir(exist_ok=True)
        _round(arguments, values, before, folder, number, stop)
        before = folder / RUN


def _stopped(arguments: argparse.Namespace, where: str) -> Stopped:
    again = f"moeyard align {arguments.source} {arguments.target}"
    return Stopped(f"stopped {where}; go on with: {again}")


def _round(
    arguments: argparse.Namespace,
    values: dict[str, Any],
    before: Path,
    folder: Path,
    number: int,
    stop: "StopRequest",
) -> None:
    """Let the model of ``before`` generate pairs, and train it on them; skip what is done.

    Raises :class:`Stopped` if it is asked to stop.
    """
    from ..training.checkpoints.export import export_newest
    from ..training.formats.sessions import SessionsConfig
    from ..training.program import train
    from ..training.read_config import complete_run_config

    model = export_newest(before)
    run_dir = folder / RUN
    alignment = values["data"]["alignment"] | {"pairs": str(folder / PAIRS)}
    data = values["data"] | {"alignment": alignment}
    own = values | {"run_dir": str(run_dir), "start_from": str(model), "model": {}, "data": data}
    own["seed"] = int(values.get("seed", 0)) + number
    config = complete_run_config(own)
    section = config.data
    assert isinstance(section, SessionsConfig) and section.alignment is not None, "checked by run"
    if section.alignment.weight > 0 and not (folder / PAIRS).exists():
        _sample(arguments, config, model, folder, stop)
    if not _is_finished(run_dir, config.train.steps) and stop.signal_name is None:
        train(config, None, stop)
    if not _is_finished(run_dir, config.train.steps):
        raise _stopped(arguments, f"in round {number}")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    facts = " ".join(f"{name}={last[name]:.4f}" for name in ("eval_loss", "eval_recall"))
    sys.stderr.write(f"event=round number={number} {facts} run={run_dir}\n")


def _is_finished(run_dir: Path, steps: int) -> bool:
    """Return whether a run has the checkpoint of its last step."""
    from ..parallel.mesh import Mesh
    from ..training.checkpoints.checkpoint import Checkpoints

    newest = Checkpoints(run_dir, Mesh(), keep=1).newest_whole() if run_dir.is_dir() else None
    return newest is not None and int(newest.name.rpartition("-")[2]) >= steps


def _sample(
    arguments: argparse.Namespace,
    config: "RunConfig",
    model: Path,
    folder: Path,
    stop: "StopRequest",
) -> None:
    """Write the pairs of a round, and the reward model if there is none."""
    from ..serving.load_kinds import load_recommender
    from ..training.alignment.sample_pairs import sample_pairs
    from ..training.data.session_pairs import write_pairs
    from ..training.work import LongWork

    data = _data(config, folder, stop)
    reward = _reward_model(arguments.target / REWARD, data, config, stop)
    recommender = load_recommender(model).model
    sizes = (arguments.share, arguments.beams)
    with LongWork("generating sessions", stop) as work:
        found = sample_pairs(
            recommender, data.train, reward, *sizes, seed=config.seed, advance=work.advance
        )
    write_pairs(folder / PAIRS, found.pairs, data.train)
    gap = found.pairs.rewards_P2[:, 0] - found.pairs.rewards_P2[:, 1]
    sys.stderr.write(
        f"event=pairs pairs={len(gap)} mean_reward={found.mean_reward:.4f} "
        f"mean_gap={float(gap.mean()):.4f}\n"
    )


def _data(config: "RunConfig", folder: Path, stop: "StopRequest") -> "SessionsData":
    """Open the sessions of a round, which has no pairs yet."""
    from ..parallel.mesh import Mesh
    from ..training.data.sessions import build_sessions_data

    section = config.data.model_copy(update={"alignment": None})
    config = config.model_copy(update={"data": section})
    return build_sessions_data(config, folder / RUN / "data", Mesh(), stop)


def _reward_model(
    path: Path, data: "SessionsData", config: "RunConfig", stop: "StopRequest"
) -> "RewardModel":
    """Open the reward model, or fit one to the log; all rounds have the same."""
    from ..training.alignment.fit_reward import fit_reward_model
    from ..training.alignment.reward import read_reward_model, save_reward_model
    from ..training.formats.sessions import SessionsConfig
    from ..training.work import LongWork

    if path.exists():
        return read_reward_model(path, data.table)
    assert isinstance(config.data, SessionsConfig), "checked by run"
    least_s = config.data.positive_watch_s
    with LongWork("fitting the reward model", stop) as work:
        fitted = fit_reward_model(data.all_sessions, data.table, least_s, config.seed, work.advance)
    save_reward_model(fitted.model, path)
    sys.stderr.write(f"event=reward loss={fitted.loss:.4f} base_loss={fitted.base_loss:.4f}\n")
    return fitted.model
