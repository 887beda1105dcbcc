"""``moeyard trace place``: ways to place experts on ranks, compared by recorded routes."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import short_name
from ..errors import ConfigError
from .options import Parsers, add_allow_code, add_command, add_route_files

if TYPE_CHECKING:
    from ..moe.config.model import LayersConfig
    from ..parallel.planning.from_routes import Judgement, Plan
    from ..parallel.planning.shadow import ShadowCosts

LEGEND = """\
share: the fullest rank's rows over the mean of all ranks, on average; worst: in the worst layer
later: share in the second half of the steps; plans are made from the first half
moved: experts with another owner than the contiguous one
away, far: rows that another rank, and another node, computes
link: {unit} of the busiest rank in a step, one way, all layers
"""


def add(kinds: Parsers) -> None:
    """Add the command."""
    place = add_command(kinds, "place", "compare ways to place experts on ranks")
    add_route_files(place)
    place.add_argument("--ranks", type=int, required=True, help="ranks that share the experts")
    place.add_argument("--ranks-per-node", type=int, help="default: all ranks on one node")
    place.add_argument(
        "--model",
        help="the model of the routes: a model folder, a run's folder, or OWNER/MODEL of the hub",
    )
    place.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16"),
        default="bf16",
        help="type of rows and copies; float32 and bfloat16 work, too",
    )
    place.add_argument(
        "--copies",
        nargs="+",
        default=[],
        metavar="BYTES",
        help="memory of a rank for copies of one layer's experts, such as 64MiB; several to "
        "compare; needs --model",
    )
    place.add_argument(
        "--shadow",
        nargs=2,
        type=float,
        metavar=("FLOPS", "BYTES"),
        help="add FasterMoE's shadows for ranks with this many FLOP/s and links with this many "
        "bytes/s; needs --model",
    )
    place.add_argument("--out", type=Path, metavar="PLAN", help="write a plan as JSON")
    place.add_argument(
        "--kind",
        metavar="PLACEMENT",
        help="placement to write, with the most copies; default: the one with the smallest share",
    )
    place.add_argument("--json", action="store_true", help="print JSON")
    add_allow_code(place)
    place.set_defaults(run=run)


@dataclass(frozen=True)
class _Row:
    """A line of the table."""

    plan: "Plan"
    early: "Judgement"
    later: "Judgement | None"
    """None if one step was recorded."""


@dataclass(frozen=True)
class _Sizes:
    """What --model tells."""

    row_bytes: int
    expert_bytes: int
    costs: "ShadowCosts | None"


def run(arguments: argparse.Namespace) -> None:
    """Print the table and write the plan."""
    from ..moe.routes.reader import route_files
    from ..parallel.planning.from_routes import RecordedLoads, judge, make_plans
    from ..parallel.planning.materialize import CopyBudget
    from ..parallel.planning.placement import Topology, check_ranks

    topology = Topology(arguments.ranks, arguments.ranks_per_node or arguments.ranks)
    files = route_files(arguments.files)
    header = files[0].header
    check_ranks(header.num_experts, arguments.ranks)
    sizes, budgets = None, []
    if arguments.model is not None:
        config = _model_config(arguments)
        files[0].check_model(config)
        sizes = _sizes_of(config, arguments)
        layer_bytes = sizes.expert_bytes * header.num_experts
        sized = [_bytes_of(text, layer_bytes) for text in arguments.copies]
        budgets = [CopyBudget.of_sizes(sizes.expert_bytes, size).per_rank for size in sized]
    elif arguments.copies or arguments.shadow:
        raise ConfigError("--copies and --shadow need the size of an expert; give --model.")
    loads = RecordedLoads.of(files)
    for file in files:
        if file.damage is not None:
            sys.stderr.write(f"warning: {file.damage}\n")
    shadows = None if sizes is None or sizes.costs is None else (sizes.costs, loads.early_steps)
    plans = make_plans(loads.early_LE, topology, budgets, shadows)
    rows = [
        _Row(
            plan,
            judge(plan, loads.early_LE, loads.early_steps, topology),
            judge(plan, loads.late_LE, loads.late_steps, topology) if loads.late_steps else None,
        )
        for plan in plans
    ]
    if arguments.json:
        values = [_values(row, sizes) for row in rows]
        sys.stdout.write(json.dumps({"placements": values}, indent=1) + "\n")
    else:
        steps = f"steps={loads.early_steps}+{loads.late_steps}"
        sizes_of = "" if sizes is None else f" expert_bytes={sizes.expert_bytes}"
        sys.stdout.write(
            f"placements ranks={topology.num_ranks} nodes={topology.num_nodes} "
            f"experts={header.num_experts} layers={len(header.moe_layers)} {steps}{sizes_of}\n"
        )
        sys.stdout.write(_table(rows, sizes))
    if arguments.out is not None:
        _write(arguments, rows)


def _model_config(arguments: argparse.Namespace) -> "LayersConfig":
    """Read the configuration of --model, and no weights."""
    from ..moe.folders.hf_config import from_hf
    from ..moe.folders.hub import local_folder
    from ..moe.folders.json_file import read_json
    from ..moe.routers.own_code import allow
    from .model_folder import model_folder

    allow(arguments.allow_code)
    folder = local_folder(model_folder(arguments.model), weights=False)
    return from_hf(read_json(folder / "config.json"))


def _sizes_of(config: "LayersConfig", arguments: argparse.Namespace) -> _Sizes:
    from ..dtypes import torch_dtype
    from ..moe.folders.expert_slots import expert_bytes
    from ..parallel.planning.shadow import ShadowCosts

    assert config.moe is not None, "routes of a model without experts"
    dtype = torch_dtype(arguments.dtype)
    costs = None
    if arguments.shadow is not None:
        flops, link = arguments.shadow
        if not (flops > 0 and link > 0):
            raise ConfigError(f"--shadow is {flops:g} {link:g}; both must be above 0.")
        sizes = (config.d_model, config.moe.d_expert, flops, link)
        costs = ShadowCosts.of_sizes(*sizes, config.moe.matrices, dtype.itemsize)
    expert = expert_bytes(config, dtype, None)
    return _Sizes(config.d_model * dtype.itemsize, expert, costs)


def _bytes_of(text: str, layer_bytes: int) -> int:
    """Return the bytes of --copies; a percentage is one of a layer's experts."""
    from ..serving.experts.budget import parse_budget

    return parse_budget(text, layer_bytes, "--copies")


def _values(row: _Row, sizes: _Sizes | None) -> dict[str, Any]:
    """Return a row for JSON."""
    plan = row.plan
    facts: dict[str, Any] = {"kind": plan.kind, "budget": plan.budget, "copies": plan.copies}
    if sizes is not None:
        facts["row_bytes"], facts["expert_bytes"] = sizes.row_bytes, sizes.expert_bytes
    later = None if row.later is None else row.later.as_dict()
    return {**facts, "moved": plan.moved, "early": row.early.as_dict(), "later": later}


def _table(rows: list[_Row], sizes: _Sizes | None) -> str:
    """Return the rows as text."""
    unit = "rows" if sizes is None else "MB"
    head = f"{'placement':<12} {'copies':>6} {'share':>6} {'worst':>6} {'later':>6} {'moved':>6} "
    head += f"{'away':>6} {'far':>6} {'link':>9}"
    lines = [head if sizes is None else f"{head} {'copied':>9}"]
    for row in rows:
        plan, early = row.plan, row.early
        later = "-" if row.later is None else f"{row.later.share:.2f}"
        line = f"{plan.kind:<12} {max(plan.copies):6} {early.share:6.2f} {early.worst_share:6.2f} "
        line += f"{later:>6} {plan.moved:6} {early.moving:6.1%} {early.crossing:6.1%} "
        if sizes is None:
            lines.append(f"{line}{early.link_rows:9.1f}")
            continue
        link = early.link_rows * sizes.row_bytes / 1e6
        copied = sum(plan.copies) * sizes.expert_bytes / 1e6
        lines.append(f"{line}{link:9.3g} {copied:9.3g}")
    legend = LEGEND.format(unit=unit)
    if sizes is not None:
        legend += "copied: MB of experts that the rank with most copies receives, all layers\n"
    return "\n".join(lines) + "\n" + legend


def _write(arguments: argparse.Namespace, rows: list[_Row]) -> None:
    """Write the plan that the user named, or the most even one."""
    from ..moe.routes.reader import route_files
    from ..parallel.planning.plan_file import LayerPlan, PlanFile, write_plan

    kinds = list(dict.fromkeys(row.plan.kind for row in rows))
    if arguments.kind not in (None, *kinds):
        raise ConfigError(f"--kind is {arguments.kind!r}; use one of {', '.join(kinds)}.")
    named = [row for row in rows if arguments.kind in (None, row.plan.kind)]
    if arguments.kind is None:
        chosen = min(named, key=lambda row: row.early.share)
    else:
        chosen = max(named, key=lambda row: row.plan.budget or 0)
    header = route_files(arguments.files)[0].header
    layers = zip(header.moe_layers, chosen.plan.placements_L, strict=True)
    plan = PlanFile(
        architecture=header.model.architecture,
        num_experts=header.num_experts,
        ranks=arguments.ranks,
        ranks_per_node=arguments.ranks_per_node or arguments.ranks,
        kind=chosen.plan.kind,
        layers=tuple(
            LayerPlan(layer=layer, owner=p.owner_E, holders=p.holders_E) for layer, p in layers
        ),
    )
    write_plan(arguments.out, plan)
    if not arguments.json:
        share = chosen.early.share
        sys.stdout.write(f"plan file={arguments.out} kind={plan.kind} share={share:.3f}\n")
