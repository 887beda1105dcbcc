"""``moeyard cluster``: a trained model with routers by clusters of what it computed."""

import argparse
import sys
from pathlib import Path

from .options import Parsers, add_command


def add(parsers: Parsers) -> None:
    """Add the command."""
    cluster = add_command(
        parsers, "cluster", "give a trained model routers by k-means of its own rows (Moirai-MoE)"
    )
    cluster.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a training run")
    cluster.add_argument("target", type=Path, metavar="DST", help="model folder to write")
    cluster.add_argument(
        "--data",
        metavar="FILE",
        help="data to run the model on, of the run's format; default: the run's own",
    )
    cluster.add_argument(
        "--experts",
        type=int,
        metavar="N",
        help="experts of each layer of a dense model, copies of its MLP; default: those it has",
    )
    cluster.add_argument("--k", type=int, default=2, help="experts each token visits")
    cluster.add_argument(
        "--choose",
        choices=("nearest", "farthest"),
        default="nearest",
        help="nearest: as the paper says; farthest: as its released code and weights do",
    )
    cluster.add_argument(
        "--rows", type=int, default=20_000, metavar="N", help="rows of each layer to cluster"
    )
    cluster.add_argument("--seed", type=int, default=0, help="seed of the first centroids")
    cluster.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the folder, and print how much the clusters explain."""
    from ..configuration import validate_config
    from ..training.cluster import ClusterSettings, cluster
    from ..training.stop import StopRequest

    names = ClusterSettings.model_fields
    settings = validate_config(
        ClusterSettings, {name: value for name, value in vars(arguments).items() if name in names}
    )
    stop = StopRequest()
    stop.listen()
    found = cluster(arguments.run_dir, arguments.target, settings, arguments.data, stop)
    explained = ",".join(f"{share:.3f}" for share in found.explained)
    sys.stdout.write(
        f"clustered folder={arguments.target} model_type={found.model_type} rows={found.num_rows} "
        f"explained={explained}\n"
    )
