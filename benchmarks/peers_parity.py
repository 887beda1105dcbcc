"""Which systems train an MoE layer right, and how fast, at every degree of expert parallelism?

    python benchmarks/peers_parity.py --python deepspeed=VENV/bin/python huggingface=... \\
        [--install FOLDER] [--only NAME ...] [--no-timing | --no-check] [--rounds 5] [--steps 3]

The model is peers_parity_problem.py's: one MoE layer, E=8, top-2, SwiGLU experts, on 2 and 4
processes of one thread, gloo on loopback. The router's weights declare the load. Everyone gets the
same weights and rows in fp32; the answer is one process's in fp64.

- Check: loss, norm, the update of one SGD step without clipping (the gradient), and with clipping.
- Timing: a step of forward, backward, clipping and SGD at a larger size, the same FLOPs for all.
  All systems of a cell are started, and then take turns for a few steps each. The ratio is the
  median of the rounds' ratios of their seconds to ours in the same type.

A system runs in the Python that ``--python NAME=PATH`` names; one without is left out.
``--install FOLDER`` makes those Pythons in FOLDER from the package index.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers_parity_peers import PEERS, Peer, install, start
from peers_parity_problem import flops, max_over_mean, truth, write_problem
from peers_parity_ranks import Ranks

from moeyard.errors import MoeyardError

from report import write_results

LOADS = ["uniform", "zipf", "one_hot"]
MESHES = ["2x1", "2x2", "4x1", "4x2", "4x4"]
"""Processes and expert-parallel degree."""
SMALL = {"tokens": 64, "width": 32, "inner": 48, "experts": 8, "outputs": 16}
LARGE = {"tokens": 2048, "width": 256, "inner": 512, "experts": 8, "outputs": 256}
"""Tokens are those of all ranks."""
WANTED = 1.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--install", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", help="titles or files of systems")
    parser.add_argument("--meshes", nargs="+", default=MESHES, metavar="PxE")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120, metavar="S")
    arguments = parser.parse_args()
    given = dict(part.split("=", 1) for part in arguments.python)
    pythons = {"ours": sys.executable} | {n: str(Path(p).absolute()) for n, p in given.items()}
    if arguments.install is not None:
        pythons |= install(arguments.install)
    peers = [peer for peer in PEERS if peer.python_name in pythons]
    if arguments.only:
        peers = [peer for peer in peers if {peer.title, peer.file} & {*arguments.only}]
    figures: dict = {"systems": [peer.title for peer in peers], "large": LARGE}
    name = "peers_parity_timing" if arguments.no_check else "peers_parity"
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Callable[..., Iterator[dict]]] = {}
        if not arguments.no_check:
            kinds["checks"] = check_all
        if not arguments.no_timing:
            kinds["timings"] = time_all
        for kind, measure in kinds.items():
            figures[kind] = []
            for found in measure(peers, pythons, Path(folder), arguments):
                figures[kind].append(found)
                write_results(name, figures)  # what is there stays if the run is stopped
    print(f"written to {name}.json")
    return 0


def cells_of(arguments: argparse.Namespace) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield numbers of processes, each with its expert-parallel degrees and loads."""
    meshes = [tuple(map(int, mesh.split("x"))) for mesh in arguments.meshes]
    for ranks in dict.fromkeys(ranks for ranks, _ in meshes):
        degrees = [ep for number, ep in meshes if number == ranks]
        yield ranks, [(ep, load) for ep in degrees for load in LOADS]


def check_all(
    peers: list[Peer], pythons: dict[str, str], folder: Path, arguments: argparse.Namespace
) -> Iterator[dict]:
    """Compare every system with the answer at every mesh and load."""
    path = folder / "small.pt"
    problem = write_problem(path, SMALL, LOADS, lr=1.0)
    problem["truth"] = {load: truth(problem, load) for load in LOADS}
    torch.save(problem, path)
    for load, right in problem["truth"].items():
        print(
            f"{load}: fullest expert {max_over_mean(problem, load):.2f} of the mean, loss "
            f"{right['loss']:.6f}, norm {right['norm']:.6f}"
        )
    print(CHECK_HEAD, flush=True)
    for ranks, cells in cells_of(arguments):
        for peer in peers:
            running = start(peer, pythons, ranks)
            try:
                for ep, load in cells:
                    if not peer.can(ranks, ep):
                        continue
                    case = {"problem": str(path), "load": load, "ep": ep}
                    found = running.ask(arguments.timeout, do="check", **case)
                    row = {"system": peer.title, "ranks": ranks, "ep": ep, "load": load, **found}
                    judge(row, problem["truth"][load], peer.limit)
                    print(check_line(row), flush=True)
                    yield row
            except MoeyardError as error:
                print(f"| {peer.title} | {ranks} | failed: {error} |", flush=True)
                yield {"system": peer.title, "ranks": ranks, "failed": str(error)}
            finally:
                running.close()


def judge(row: dict, right: dict, limit: float) -> None:
    """Add relative errors, and whether each is what rounding makes."""
    row["loss_error"] = abs(row["loss"] / right["loss"] - 1)
    if "norm" in row:
        row["norm_error"] = row["norm"] / right["norm"] - 1
    row["right"] = {
        "loss": row["loss_error"] <= limit,
        "norm": abs(row["norm_error"]) <= limit if "norm" in row else None,
        "gradient": row["unclipped"]["all"]["error"] <= limit,
        "update": row["clipped"]["all"]["error"] <= limit,
        "copies": row["ranks_differ"] <= limit,
    }


CHECK_HEAD = """
| system | processes | EP | load | loss off by | norm is | gradient off by | clipped update off by \
| and is (dense, router, experts) | ranks differ by | wrong |
|---|---|---|---|---|---|---|---|---|---|---|"""


def check_line(row: dict) -> str:
    """Return a row of the table in Markdown; sizes are 1 where they are right."""
    norm = f"{1 + row['norm_error']:.4f}" if "norm" in row else "not said"
    sizes = ", ".join(f"{row['clipped'][g]['size']:.3f}" for g in ("dense", "router", "experts"))
    wrong = ", ".join(name for name, is_right in row["right"].items() if is_right is False)
    cells = [row["system"], row["ranks"], row["ep"], row["load"], f"{row['loss_error']:.0e}", norm]
    cells += [f"{row[kind]['all']['error']:.0e}" for kind in ("unclipped", "clipped")]
    cells += [sizes, f"{row['ranks_differ']:.0e}", f"**{wrong}**" if wrong else "-"]
    return "| " + " | ".join(map(str, cells)) + " |"


def time_all(
    peers: list[Peer], pythons: dict[str, str], folder: Path, arguments: argparse.Namespace
) -> Iterator[dict]:
    """Time all systems of each mesh and load in turns."""
    path = folder / "large.pt"
    problem = write_problem(path, LARGE, LOADS, lr=1e-3)
    loads = {load: round(max_over_mean(problem, load), 2) for load in LOADS}
    print(f"\nfullest expert over the mean: {loads}; {LARGE}", flush=True)
    for ranks, cells in cells_of(arguments):
        running = {peer: start(peer, pythons, ranks) for peer in peers}
        try:
            for ep, load in cells:
                case = {"problem": str(path), "load": load, "ep": ep}
                here = {p: system for p, system in running.items() if p.can(ranks, ep)}
                turns = time_cell(here, case, arguments)
                cell = {"ranks": ranks, "ep": ep, "load": load, "turns": turns}
                print("\n".join(timing_lines(cell)), flush=True)
                yield cell
                running = {p: s for p, s in running.items() if p not in here or p.title in turns}
        finally:
            for system in running.values():
                system.close()


def time_cell(
    running: dict[Peer, Ranks], case: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, list[dict]]:
    """Return what each system took in every round; one that fails has no more turns."""
    turns: dict[str, list[dict]] = {}
    for number in range(-1, arguments.rounds):
        peers = list(running)
        first = number % len(peers)
        for peer in peers[first:] + peers[:first]:
            try:
                if number < 0:
                    running[peer].ask(arguments.timeout, do="build", **case)
                    turns[peer.title] = []
                else:
                    found = running[peer].ask(arguments.timeout, do="steps", count=arguments.steps)
                    turns[peer.title].append(found)
            except MoeyardError as error:
                print(f"left out: {error}", flush=True)
                running.pop(peer).close()
                turns.pop(peer.title, None)
    return {peer.title: turns[peer.title] for peer in running}


def timing_lines(cell: dict) -> Iterator[str]:
    """Yield a line for each system, and add figures to the cell."""
    yield f"{cell['ranks']} processes, EP {cell['ep']}, {cell['load']}"
    figures = cell["figures"] = {}
    rivals = {peer.title: peer.rival for peer in PEERS}
    for name, turns in cell["turns"].items():
        ours = cell["turns"].get(rivals[name], cell["turns"]["moeyard"])
        median = statistics.median(turn["seconds"] for turn in turns)
        pairs = list(zip(turns, ours, strict=True))
        ratios = [theirs["seconds"] / our["seconds"] for theirs, our in pairs]
        cpu = statistics.median(t["cpu_seconds"] / our["cpu_seconds"] for t, our in pairs)
        ratio = statistics.median(ratios)
        figures[name] = {"median_s": median, "ratio": ratio, "ratios": ratios, "cpu_ratio": cpu}
        yield (
            f"  {name:18} {median * 1e3:7.1f} ms  {LARGE['tokens'] / median:7.0f} tokens/s  "
            f"{flops(LARGE) / median / 1e9:6.1f} GFLOP/s  ours x{ratio:5.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}), in CPU time x{cpu:.2f}"
        )
    theirs = {n: f["ratio"] for n, f in figures.items() if not n.startswith("moeyard")}
    if theirs:
        best = min(theirs, key=lambda name: theirs[name])
        cell["best"], cell["over_best"] = best, theirs[best]
        verdict = "reached" if theirs[best] >= WANTED else "NOT reached"
        yield f"  best other: {best}; ours is x{theirs[best]:.2f} as fast; x{WANTED} {verdict}"


if __name__ == "__main__":
    sys.exit(main())
