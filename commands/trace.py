"""``moeyard trace``: route files, which say which experts every token visited."""

import argparse
import json
import sys
from pathlib import Path

from . import trace_gates, trace_place, trace_predict, trace_replay
from .options import Parsers, add_command, add_loading, add_model, add_route_files


def add(parsers: Parsers) -> None:
    """Add the command and its sub-commands."""
    trace = add_command(parsers, "trace", "look at recorded routes, or replay them in caches")
    kinds = trace.add_subparsers(required=True, metavar="WHAT", help="what to do with them")
    show = add_command(kinds, "show", "print the load of each layer, and how choices repeat")
    add_route_files(show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=run_show)
    compare = add_command(
        kinds,
        "compare",
        "let a model read recorded texts again, with its own and the recorded routes",
    )
    add_model(compare)
    compare.add_argument("file", type=Path, metavar="FILE", help="a route file of generation")
    compare.add_argument(
        "--limit", type=int, metavar="N", help="texts to read, the first ones; default: all"
    )
    compare.add_argument("--json", action="store_true", help="print JSON")
    add_loading(compare)
    compare.set_defaults(run=run_compare)
    trace_place.add(kinds)
    trace_replay.add(kinds)
    trace_predict.add(kinds)
    trace_gates.add(kinds)


def run_show(arguments: argparse.Namespace) -> None:
    """Print the summary of some files, together."""
    from ..moe.routes.reader import route_files
    from ..moe.routes.summary import summarize

    files = route_files(arguments.files)
    header = files[0].header
    summary = summarize(header, (rows for file in files for rows in file.chunks()))
    for file in files:
        if file.damage is not None:
            sys.stderr.write(f"warning: {file.damage}\n")
    if arguments.json:
        values = {"header": header.model_dump(mode="json"), **summary.as_dict()}
        sys.stdout.write(json.dumps(values, indent=1) + "\n")
        return
    facts = {
        "files": len(files),
        "program": header.written_by.get("program", "unknown"),
        "model": header.model.architecture,
        "weights_of_model": header.model.weights or "changing",
        "experts": header.num_experts,
        "k": header.k,
        "rows": summary.rows,
        **summary.phases,
        "sequences": summary.sequences,
        "steps": f"{summary.first_step}-{summary.last_step}",
        "most_choices": summary.most_choices,
        "columns": ",".join(column.name for column in header.columns),
    }
    lines = ["routes " + " ".join(f"{name}={value}" for name, value in facts.items())]
    lines.append(f"{'layer':>5} {'choices':>10} {'max/mean':>8} {'idle':>5} {'entropy':>7}  kept")
    for layer in summary.layers:
        kept = "-" if layer.kept is None else f"{layer.kept:.1%}"
        lines.append(
            f"{layer.layer:5} {layer.choices:10} {layer.max_over_mean:8.2f} {layer.idle:5} "
            f"{layer.entropy:7.3f}  {kept}"
        )
    lines.append("kept: share of a token's experts that the token before it visited, too")
    sys.stdout.write("\n".join(lines) + "\n")


def run_compare(arguments: argparse.Namespace) -> None:
    """Print how far the model's own choices and scores are from the recorded ones."""
    from ..moe.routes.compare import compare
    from ..moe.routes.reader import RouteFile
    from .model_folder import open_model

    file = RouteFile(arguments.file)
    model = open_model(arguments)
    file.check_model(model.config)
    routes = file.read()
    if file.damage is not None:
        sys.stderr.write(f"warning: {file.damage}\n")
    found = compare(model.decoder, file.header, routes, arguments.limit)
    if arguments.json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=1) + "\n")
        return
    facts = " ".join(f"{name}={value}" for name, value in found.as_dict().items())
    sys.stdout.write(f"compared {facts}\n")
