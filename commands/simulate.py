"""``moeyard simulate``: a training step on a cluster that is not there."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration import read_values, with_others
from ..errors import ConfigError
from ..training.key_check import check_keys
from .options import Parsers, add_allow_code, add_command

if TYPE_CHECKING:
    from ..parallel.planning.placement import Placement
    from ..parallel.simulation.advice import Again
    from ..parallel.simulation.choices import Choices
    from ..parallel.simulation.cluster import Cluster
    from ..parallel.simulation.step import Prediction
    from ..parallel.simulation.workload import Workload


def add(parsers: Parsers) -> None:
    """Add the command."""
    simulate = add_command(
        parsers, "simulate", "predict time, memory and cost of a training step on a cluster"
    )
    simulate.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a training run")
    simulate.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change")
    simulate.add_argument(
        "--cluster",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML file that describes the cluster, such as configs/clusters/h100-8x.yaml",
    )
    simulate.add_argument(
        "--gpus", type=int, nargs="+", metavar="N", help="GPUs in use; default: all of the cluster"
    )
    simulate.add_argument(
        "--sequences-per-gpu",
        type=int,
        metavar="N",
        help="sequences of a step for each GPU; default: train.batch_sequences over all GPUs",
    )
    load = simulate.add_mutually_exclusive_group()
    load.add_argument(
        "--routes",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="route files, or folders of them, whose loads experts get; default: even loads",
    )
    load.add_argument("--skew", metavar="zipf:S", help="loads of experts by Zipf's law")
    simulate.add_argument(
        "--fit",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="runs on such a cluster; the description is fitted to their steps first",
    )
    simulate.add_argument(
        "--write-cluster", type=Path, metavar="FILE", help="write the fitted description"
    )
    simulate.add_argument("--price", type=float, help="price of a GPU hour, in any currency")
    simulate.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="OUT",
        help="print JSON, or write it to a file next to the table",
    )
    simulate.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw time and memory")
    add_allow_code(simulate)
    simulate.set_defaults(run=run, others=[])


def run(arguments: argparse.Namespace) -> None:
    """Predict, print, and write what was asked for."""
    overrides = with_others(arguments.overrides, arguments.others)
    check_keys(read_values(arguments.config, overrides))
    cluster = _cluster(arguments)

    from ..moe.routers.own_code import allow
    from ..parallel.simulation.output import as_json, as_table
    from ..parallel.simulation.step import simulate
    from ..training.on_paper import owners_of, read_paper_config, workload_of

    allow(arguments.allow_code)
    config = read_paper_config(arguments.config, overrides)
    work = workload_of(config)
    choices_L, owners_L = _choices(arguments, work), owners_of(config, work)
    cluster = _fitted(arguments, cluster)
    found = []
    again: list[Again] = []
    for num_gpus in arguments.gpus or [cluster.num_gpus]:
        own = _with_batch(work, num_gpus, arguments.sequences_per_gpu)
        found.append(simulate(own, cluster, num_gpus, choices_L, owners_L))
        again.append(_again(cluster, num_gpus, choices_L, owners_L))
    notes = _notes(found, again, choices_L)
    if arguments.json is not None:
        _write_json(arguments, as_json(cluster, found, notes))
    if arguments.json != "-":
        sys.stdout.write(as_table(arguments.config, found, notes))
    if arguments.plot is not None:
        from ..parallel.simulation.plot import plot

        title = f"{arguments.config.name} on {cluster.name}"
        _write(arguments.plot, plot(found, title), "--plot")
    if not any(prediction.fits for prediction in found):
        raise ConfigError(f"no number of GPUs has the memory; {notes[0]}")


def _cluster(arguments: argparse.Namespace) -> "Cluster":
    from ..parallel.simulation.cluster import read_cluster

    cluster = read_cluster(arguments.cluster)
    if arguments.price is not None:
        if not arguments.price >= 0:
            raise ConfigError(f"--price is {arguments.price:g}; use 0 or more.")
        cluster = cluster.model_copy(update={"price_per_gpu_hour": arguments.price})
    if arguments.write_cluster is not None and not arguments.fit:
        raise ConfigError("--write-cluster is given without --fit; name the runs to fit to.")
    return cluster


def _fitted(arguments: argparse.Namespace, cluster: "Cluster") -> "Cluster":
    """Fit the description to the runs of --fit, and say how far each is from it."""
    if not arguments.fit:
        return cluster
    from ..parallel.simulation.cluster import to_yaml
    from ..parallel.simulation.fit import fitted
    from ..training.on_paper import measured_run

    runs = [measured_run(folder) for folder in arguments.fit]
    cluster = fitted(cluster, runs)
    lines = [f"{'fitted to':<24} {'GPUs':>5} {'measured ms':>11} {'predicted ms':>12} {'error':>7}"]
    for one in runs:
        step_s = one.predict(cluster).step_s
        lines.append(
            f"{one.name:<24} {one.num_gpus:5} {1000 * one.step_s:11.4g} {1000 * step_s:12.4g} "
            f"{step_s / one.step_s - 1:+7.1%}"
        )
    if arguments.json != "-":
        sys.stdout.write("\n".join(lines) + "\n\n")
    if arguments.write_cluster is not None:
        _write(arguments.write_cluster, to_yaml(cluster), "--write-cluster")
    return cluster


def _choices(arguments: argparse.Namespace, work: "Workload") -> "list[Choices]":
    """Return how tokens choose in each MoE layer; empty = evenly."""
    moe = work.model.moe
    given = "--routes" if arguments.routes else "--skew"
    if not arguments.routes and arguments.skew is None:
        return []
    if moe is None:
        raise ConfigError(f"{given} is given, but the model has no experts; leave it out.")
    if arguments.skew is not None:
        from ..parallel.simulation.choices import skewed

        return skewed(arguments.skew, moe.num_experts, moe.router.k, len(work.model.moe_layers))
    from ..moe.routes.reader import route_files
    from ..parallel.planning.from_routes import RecordedLoads
    from ..training.on_paper import choices_of

    files = route_files(arguments.routes)
    files[0].check_model(work.model)
    loads = RecordedLoads.of(files)
    for file in files:
        if file.damage is not None:
            sys.stderr.write(f"warning: {file.damage}\n")
    return choices_of((loads.early_LE + loads.late_LE).tolist(), work)


def _with_batch(work: "Workload", num_gpus: int, sequences: int | None) -> "Workload":
    if sequences is None:
        return work
    if sequences < 1 or sequences % work.accumulation:
        raise ConfigError(
            f"--sequences-per-gpu is {sequences}; use a multiple of train.accumulation = "
            f"{work.accumulation}."
        )
    return replace(work, batch_sequences=sequences * num_gpus)


def _again(
    cluster: "Cluster", num_gpus: int, choices_L: "list[Choices]", planned_L: "list[Placement]"
) -> "Again":
    from ..parallel.simulation.step import simulate

    def again(work: "Workload", owners_L: "Sequence[Placement] | None" = None) -> "Prediction":
        owners = planned_L if owners_L is None else owners_L
        if owners and owners[0].num_ranks != work.ep:
            owners = []  # the plan is for other ranks
        return simulate(work, cluster, num_gpus, choices_L, owners)

    return again


def _notes(
    found: "Sequence[Prediction]", again: "Sequence[Again]", choices_L: "list[Choices]"
) -> list[str]:
    """Return what does not fit with what would help, and then what would be faster."""
    from ..parallel.simulation.advice import what_fits, what_is_faster

    pairs = list(zip(found, again, strict=True))
    notes = [what_fits(prediction, other) for prediction, other in pairs if not prediction.fits]
    times: dict[str, list[str]] = {}
    for prediction, other in pairs:
        for name, time in what_is_faster(prediction, other, choices_L):
            times.setdefault(name, []).append(time)
    found_times = [f"with {name} a step would take {', '.join(t)}." for name, t in times.items()]
    return [*notes, *found_times]


def _write_json(arguments: argparse.Namespace, text: str) -> None:
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        _write(Path(arguments.json), text, "--json")


def _write(path: Path, text: str, option: str) -> None:
    from ..files import replace_text

    try:
        replace_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"{option} is {path}, which cannot be written ({error.strerror}); choose another."
        ) from None
