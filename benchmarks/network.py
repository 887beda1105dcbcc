"""The slow network that benchmarks of expert-parallel schedules run on, measured by itself.

python benchmarks/network.py [--inter 1gbit] [--intra 4gbit] [--steps 3]

Three clusters on this machine (network_bed.py says how, and how to use it): one rank on each of two
nodes; two on each, isolated; two on each that share their node's memory. On each of them: the time
of messages, fitted by ``alpha + bytes / beta``; what a rank computes alone and while all are busy;
and a few steps of configs/train/tiny.yaml with experts over all ranks, whose losses must be those
of one process. The bytes that nodes sent are checked against the links' counters. Needs root.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from moeyard.errors import MoeyardError

from network_bed import Network
from network_links import bits_per_s, stop_unless_permitted
from report import write_results
from runs import read_metrics

HERE = Path(__file__).parent
TINY = HERE.parent / "configs" / "train" / "tiny.yaml"
CLUSTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({"nodes": 2, "ranks_per_node": 1, "ranks": "isolated"}, [2]),
    ({"nodes": 2, "ranks_per_node": 2, "ranks": "isolated"}, [2, 4]),
    ({"nodes": 2, "ranks_per_node": 2, "ranks": "together"}, [2, 4]),
]
"""Clusters and the expert parallelism of the runs on them. EP=2 stays inside a node of two ranks,
and only copies of an expert talk to the other node."""
DENSE_PARAMETERS = 267_904
"""Of configs/train/tiny.yaml, outside experts. Nodes send at least their gradients in each step."""
SMALL_CORES = 0.4
LOSS_TOLERANCE = 1e-5
"""Relative. Ranks add the same numbers in another order; in three steps that changes 1e-7."""


def main() -> int:
    """Measure all clusters; 1 and a sentence where something is missing or not permitted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inter", default="1gbit", help="rate of a node's link")
    parser.add_argument("--intra", default="4gbit", help="rate of an isolated rank's link")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    arguments = parser.parse_args()
    try:
        stop_unless_permitted()
        with tempfile.TemporaryDirectory() as folder:
            alone = train_alone(Path(folder), arguments.steps)
            clusters = [
                measure(arguments, cluster, degrees, alone, Path(folder))
                for cluster, degrees in CLUSTERS
            ]
        small_shares = measure_small_shares()
    except MoeyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    figures = {"clusters": clusters, "small_shares": small_shares}
    print("written to", write_results("network", figures).name)
    return 0


def measure(
    arguments: argparse.Namespace,
    cluster: dict[str, Any],
    degrees: list[int],
    alone: list[float],
    folder: Path,
) -> dict[str, Any]:
    """Measure one cluster, print what was found and return it; ``alone`` is one process's loss."""
    with Network(**cluster, inter=arguments.inter, intra=arguments.intra) as network:
        print(
            f"\n{network.nodes} nodes, {network.ranks_per_node} rank(s) each, {cluster['ranks']}: "
            f"{network.inter} between nodes, "
            + (f"{network.intra} a rank, " if network.is_isolated else "memory inside, ")
            + f"{network.cores_per_rank:g} cores a rank"
        )
        return {
            **cluster,
            "inter": network.inter,
            "intra": network.intra if network.is_isolated else None,
            "cores_per_rank": network.cores_per_rank,
            "links": measure_links(network),
            "compute": measure_compute(network),
            "training": [train_on(network, ep, alone, folder) for ep in degrees],
        }


def measure_links(network: Network) -> dict[str, Any]:
    """Time exchanges of all sizes, fit them, and check the bytes that node 0 has sent."""
    finished = network.run([str(HERE / "network_case.py"), "links"])
    found = json.loads(finished.outputs[0])
    figures: dict[str, Any] = {}
    for name, times in found["exchanges"].items():
        is_inside = name == "one pair inside a node"
        wanted = bits_per_s(network.intra if is_inside else network.inter) / 1e9
        alpha_s, gbit_per_s = fit(times)
        figures[name] = {"alpha_us": 1e6 * alpha_s, "gbit_per_s": gbit_per_s, "times": times}
        row = "  ".join(f"{num_bytes >> 10} KiB {1e3 * s:.2f} ms" for num_bytes, s in times)
        limit = f"of {wanted:g}" if network.is_isolated or not is_inside else "through loopback"
        print(f"  {name:30} {1e6 * alpha_s:4.0f} us + bytes at {gbit_per_s:5.2f} Gbit/s {limit}")
        print(f"    {row}")
    traffic = finished.traffic
    traffic.check_sent({"node0": found["node0_bytes"]})
    excess = traffic.sent["node0"] / found["node0_bytes"] - 1
    print(
        f"  node 0 sent {traffic.sent['node0']} bytes, {100 * excess:.1f} % more than the messages "
        f"held; full queues dropped {sum(traffic.dropped.values())} frames"
    )
    return {**figures, "node0_bytes": found["node0_bytes"], "traffic": vars(traffic)}


def fit(times: list[tuple[int, float]]) -> tuple[float, float]:
    """Return alpha in seconds and beta in Gbit/s, by the least squares of relative errors."""
    num_bytes, seconds = np.array(times).T
    terms = np.stack([np.ones_like(seconds), 8e-9 * num_bytes], axis=1) / seconds[:, None]
    (alpha_s, s_per_gbit), *_ = np.linalg.lstsq(terms, np.ones_like(seconds), rcond=None)
    return float(alpha_s), float(1 / s_per_gbit)


def measure_compute(network: Network) -> dict[str, Any]:
    """Say how many cores a rank uses alone and while all are busy, and what it computes."""
    finished = network.run([str(HERE / "network_case.py"), "compute"], timeout_s=400)
    found = json.loads(finished.outputs[0])
    alone, busy = found["alone"], found["all_busy"]
    rates = "  ".join(f"{rank['products_per_s']:.0f} ({rank['cores']:.3f} cores)" for rank in busy)
    print(
        "  products a second: rank 0 while the others wait "
        f"{alone['products_per_s']:.0f} ({alone['cores']:.3f} cores); all busy {rates}"
    )
    return found


def measure_small_shares() -> dict[str, Any]:
    """Measure shares that a busy machine grants as well: there only the quota binds."""
    with Network(cores=SMALL_CORES) as network:
        print(f"\n2 nodes, 2 ranks each, isolated, {network.cores_per_rank:g} cores a rank")
        return {"cores_per_rank": network.cores_per_rank, "compute": measure_compute(network)}


def train_arguments(steps: int, run_dir: Path, ep: int) -> list[str]:
    """Return what follows ``python`` in a command that trains a few steps."""
    overrides = {"run_dir": run_dir, "parallel.ep": ep, "train.steps": steps}
    overrides |= {"train.log_every": 1, "train.eval_sequences": 4}
    changed = [f"{name}={value}" for name, value in overrides.items()]
    return ["-m", "moeyard.training", str(TINY), *changed]


def train_alone(folder: Path, steps: int) -> list[float]:
    """Train in one process without a network and return the losses of the steps."""
    command = [sys.executable, *train_arguments(steps, folder / "alone", ep=1)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, capture_output=True, check=True)
    losses = [record["loss"] for record in read_metrics(folder / "alone")]
    print("training in one process: losses", *(f"{loss:.7f}" for loss in losses))
    return losses


def train_on(network: Network, ep: int, alone: list[float], folder: Path) -> dict[str, Any]:
    """Train the same steps on all ranks; the losses must be those of one process."""
    steps = len(alone)
    run_dir = folder / f"{network.is_isolated}-{network.world_size}-{ep}"
    finished = network.run(train_arguments(steps, run_dir, ep))
    records = read_metrics(run_dir)
    losses = [record["loss"] for record in records]
    difference = max(abs(a - b) / a for a, b in zip(alone, losses, strict=True))
    if difference > LOSS_TOLERANCE:
        raise MoeyardError(
            f"the losses of EP={ep} differ by {difference:.1e}, more than {LOSS_TOLERANCE:.0e}: "
            "training over this network is wrong, so nothing is written."
        )
    finished.traffic.check_sent(
        {f"node{node}": 4 * DENSE_PARAMETERS * steps for node in range(network.nodes)}
    )
    facts = next(line for line in finished.outputs[0].splitlines() if "event=started" in line)
    memory = next(fact for fact in facts.split() if fact.startswith("shared_memory="))
    megabytes = finished.traffic.sent["node0"] / steps / 1e6
    print(f"  training, EP={ep}, {memory}: losses", *(f"{loss:.7f}" for loss in losses))
    print(
        f"    differ by {difference:.0e} at most; node 0 sent {megabytes:.1f} MB a step; "
        f"{records[-1]['tokens_per_s']:.0f} tokens/s in the last step"
    )
    return {
        "ep": ep,
        "losses_alone": alone,
        "records": records,
        "traffic": vars(finished.traffic),
    }


if __name__ == "__main__":
    sys.exit(main())
