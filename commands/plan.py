"""``moeyard plan``: does a model run here, in how much memory, how fast."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    Parsers,
    add_allow_code,
    add_command,
    add_dtype,
    add_kv_memory,
    add_model,
)

if TYPE_CHECKING:
    from ..serving.planning.outlook import Option, Outlook

SHARES = ("10%", "25%", "50%", "100%")
NOTE = """\
{rows}/s are upper bounds for one {row} at a time: weights per {row} over measured bandwidths.
on_demand: reads and computing follow each other; read_ahead: all reads overlap with computing.
hit_rate: {source}.
"""


def add(parsers: Parsers) -> None:
    """Add the command."""
    plan = add_command(
        parsers, "plan", "say whether a model runs here, in how much memory, and how fast"
    )
    add_model(plan)
    plan.add_argument(
        "--expert-memory",
        action="append",
        metavar="SIZE",
        help="a budget for experts: 2GiB, 25%% or auto; repeat for several; default: "
        "10%%, 25%%, 50%%, 100%% and auto",
    )
    plan.add_argument(
        "--host-memory", metavar="SIZE", help="memory that replicas share, see moeyard serve"
    )
    add_kv_memory(plan)
    plan.add_argument("--max-num-seqs", type=int, default=8, help="requests in the batch")
    plan.add_argument(
        "--max-model-len",
        type=int,
        help="most tokens of prompt plus answer; default: what the model takes",
    )
    plan.add_argument(
        "--replicas", dest="num_replicas", metavar="N", type=int, default=1, help="of the server"
    )
    plan.add_argument(
        "--routes",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="route files of the model, written with --record-routes, to replay for hit rates",
    )
    plan.add_argument(
        "--expert-policy", default="decayed_lfu", metavar="NAME", help="for the replay"
    )
    add_dtype(plan)
    add_allow_code(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what the model needs and a line for each budget; 1 if it does not run here."""
    outlook, options = _examine(arguments)
    problem = outlook.runs_here
    if arguments.json:
        sys.stdout.write(json.dumps(_as_json(arguments, outlook, options), indent=1) + "\n")
    else:
        sys.stdout.write(_text(arguments, outlook, options))
    if problem is not None:
        sys.stderr.write(f"error: {problem}\n")
    return 0 if problem is None else 1


def _examine(arguments: argparse.Namespace) -> tuple["Outlook", list["Option"]]:
    from ..moe.folders.folder import ModelFolder
    from ..moe.folders.hub import local_folder
    from ..moe.routers.own_code import allow
    from ..serving.experts.budget import AUTO, host_bytes
    from ..serving.loading import pick_dtype
    from ..serving.memory import available_bytes
    from ..serving.planning.budget import demand_of_server
    from ..serving.planning.kv import asked_kv_bytes
    from ..serving.planning.outlook import Outlook
    from ..serving.planning.recorded_hits import RecordedHits
    from .model_folder import model_folder

    allow(arguments.allow_code)
    free = available_bytes()
    folder = ModelFolder(local_folder(model_folder(arguments.model)))
    try:
        folder.check(ignore_unused_weights=True)
        dtype = pick_dtype(folder, arguments.dtype)
        demand = demand_of_server(
            arguments.max_num_seqs,
            arguments.max_model_len,
            arguments.num_replicas,
            host_bytes(folder, dtype, arguments.host_memory),
            kv_dtype=arguments.kv_dtype,
        )
        kv = asked_kv_bytes(folder, dtype, arguments.kv_memory, demand)
        demand = replace(demand, kv_bytes=kv)
        outlook = Outlook(folder, dtype, demand, free)
        recorded = None
        if arguments.routes:
            recorded = RecordedHits(arguments.routes, folder.config, arguments.expert_policy)
        shares = [share for share in SHARES if outlook.holds_one(share)]
        budgets = arguments.expert_memory or [*shares, AUTO]
        found = [outlook.option(budget, recorded) for budget in budgets]
        return outlook, [option for option in found if option is not None]
    finally:
        folder.close()


def _text(arguments: argparse.Namespace, outlook: "Outlook", options: list["Option"]) -> str:
    from ..serving.planning.describe import per_second, size, tokens

    sizes, room, speeds = outlook.sizes, outlook.room, outlook.speeds
    rows = [
        f"model     {arguments.model}: {sizes.num_experts} experts of {size(sizes.expert_bytes)}"
        f"{' on average' if sizes.widths else ''}, "
        f"{size(sizes.all_experts_bytes)} together; a {sizes.row_name} visits "
        f"{sizes.experts_per_token}",
        f"memory    {size(room.available_bytes)} free; other weights take "
        f"{size(sizes.dense_bytes)}, processes {size(room.other_bytes)}",
        f"requests  {_requests(arguments, outlook)}",
        f"speed     memory {per_second(speeds.memory)}, disk {per_second(speeds.disk)}. "
        f"{outlook.reads.text}",
        f"{'budget':<10} {'experts':>8} {'share':>6} {'memory':>10} {'fits':>4} {'hit_rate':>8} "
        f"{'on_demand':>9} {'read_ahead':>10}",
    ]
    for option in options:
        bound = option.bound
        rows.append(
            f"{option.expert_memory:<10} {option.num_slots:>8} "
            f"{option.num_slots / sizes.num_experts:>6.0%} {size(option.needed_bytes):>10} "
            f"{'yes' if option.fits else 'no':>4} {bound.hit_rate:>8.1%} "
            f"{tokens(bound.on_demand):>9} {tokens(bound.read_ahead):>10}"
        )
    return (
        "\n".join(rows)
        + "\n"
        + NOTE.format(source=_source(arguments), row=sizes.row_name, rows=sizes.row_names)
    )


def _requests(arguments: argparse.Namespace, outlook: "Outlook") -> str:
    """Return what requests take in memory."""
    from ..serving.planning.describe import size

    sizes, room = outlook.sizes, outlook.room
    if not sizes.keeps_rows:
        return "keep no keys and values; what is computed for them is not planned"
    length = arguments.max_model_len or sizes.max_positions
    return (
        f"keys and values of {arguments.max_num_seqs} x {length} {sizes.row_names} take "
        f"{size(room.kv_wanted_bytes)}; {size(room.kv_bytes)} kept for them"
    )


def _source(arguments: argparse.Namespace) -> str:
    if arguments.routes:
        return f"of the policy {arguments.expert_policy} on the recorded routes, read on demand"
    return "as if all experts were needed equally often; real texts do better"


def _as_json(
    arguments: argparse.Namespace, outlook: "Outlook", options: list["Option"]
) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "runs_here": outlook.runs_here is None,
        "problem": outlook.runs_here,
        "sizes": asdict(outlook.sizes),
        "room": asdict(outlook.room),
        "speeds": asdict(outlook.speeds),
        "reader": asdict(outlook.reads),
        "hit_rate_is": _source(arguments),
        "budgets": [
            asdict(option)
            | {"on_demand": option.bound.on_demand, "read_ahead": option.bound.read_ahead}
            for option in options
        ],
    }
