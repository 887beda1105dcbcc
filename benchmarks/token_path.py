"""What a token costs on its way from the engine to the client's socket.

    python benchmarks/token_path.py [--model DIR] [--arms engine app serve] [--write NAME]
    python benchmarks/token_path.py --turns 60 --streams 1 --tokens 240

Three arms: the bare engine, the engine behind the HTTP application (uvicorn, one process), and
``moeyard serve``. The same greedy streams in each, ``--streams`` at once. Printed: tokens per
second, ms between tokens of a stream, and CPU microseconds per chunk, from the kernel's
nanosecond account of every thread. "engine" is the busiest thread of the process with the model
(run it with one compute thread), "path" is the rest of that process, "proxy" is Ray's HTTP proxy.
Without ``--model``: random weights in the demo's shape, whose head never chooses half a character,
so that every token is a chunk. ``--spelled`` gives another model a tokenizer for that.

With ``--turns`` the engine and ``moeyard serve`` are open at the same time and take turns of one
answer, so that a machine whose speed changes by the minute meets both. It prints medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from token_path_arms import (
    PROMPT,
    app,
    bare_engine,
    engine_figures,
    engine_turns,
    serve,
    write_demo_model,
    write_spelled,
)
from token_path_client import counts_of, differences
from token_path_profile import profile

from report import write_results

HERE = Path(__file__).parent
ARMS = ("engine", "app", "serve")
IDLE_S = 2.0
PROFILE_S = 4.0
PROFILE_TOKENS = 4000


def client_command(
    port: int, name: str, num_streams: int, num_tokens: int, pids: dict[str, int]
) -> list[str]:
    """Return the command that runs the client."""
    body = {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    command = [sys.executable, str(HERE / "token_path_client.py"), str(port), json.dumps(body)]
    return [*command, str(num_streams), *map(str, pids.values())]


def ask(
    port: int, name: str, num_streams: int, num_tokens: int, pids: dict[str, int]
) -> dict[str, Any]:
    """Have the client measure; return figures per chunk, in microseconds."""
    command = client_command(port, name, num_streams, num_tokens, pids)
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    chunks = found["chunks"]
    result = {key: found[key] for key in ("seconds", "chunks", "reads")}
    for part, pid in pids.items():
        spent = sorted(found["counts"][str(pid)])
        if part == "path":
            result |= engine_figures(spent.pop(), chunks)
        result[part] = sum(counts[0] for counts in spent) / chunks / 1000
    return result


def idle(pids: dict[str, int]) -> str:
    """Say what the processes spend on nothing: Ray's own threads count for chunks too."""
    before = counts_of(list(pids.values()))
    time.sleep(IDLE_S)
    after = counts_of(list(pids.values()))
    spent = dict.fromkeys(pids.values(), 0)
    for (pid, _), counts in differences(before, after).items():
        spent[pid] += counts[0]
    return "  ".join(f"{part} {spent[pid] / IDLE_S / 1e6:.1f}" for part, pid in pids.items())


def show_profile(port: int, name: str, num_streams: int, pids: dict[str, int]) -> None:
    """Print what the path's time goes into, while long streams run."""
    command = client_command(port, name, num_streams, PROFILE_TOKENS, {})
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
        for part, pid in pids.items():
            found = profile(pid, PROFILE_S)
            total = sum(count for kind, count in found.items() if kind != "engine")
            shares = (
                f"{kind} {n / total:.0%}" for kind, n in found.most_common() if kind != "engine"
            )
            print(f"  {part} at {num_streams} streams, {total} samples: {', '.join(shares)}")
        client.kill()


def line(arm: str, num_streams: int, result: dict[str, Any]) -> str:
    """Word a result."""
    rate = result["chunks"] / result["seconds"]
    cpu = "  ".join(
        f"{part} {result[part]:7.1f}" for part in ("engine", "path", "proxy") if part in result
    )
    return (
        f"{arm:12} {num_streams:3} streams {rate:8.0f} tokens/s "
        f"{num_streams / rate * 1000:7.3f} ms a token   CPU us per chunk: {cpu}   "
        f"engine's waits {result['waits']:.2f} preemptions {result['preemptions']:.2f} "
        f"faults {result['faults']:.2f}"
    )


def take_turns(model: str, num_streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """Let the engine and the server answer in turns; return ms between tokens of a stream."""
    name, ms = Path(model).name, {"engine": list[float](), "serve": list[float]()}
    sizes = (num_streams, args.tokens, args.threads)
    options = _pairs(args.env)
    with (
        serve(model, num_streams, args.threads, **options) as (port, pids),
        engine_turns(model, *sizes) as turn,
    ):
        for number in range(1 + args.turns):
            pair = {"engine": turn(), "serve": ask(port, name, *sizes[:2], pids)}
            for arm, found in pair.items():
                if number:  # the first pair warms up
                    ms[arm].append(1000 * num_streams * found["seconds"] / found["chunks"])
    more = [b - a for a, b in zip(ms["engine"], ms["serve"], strict=True)]
    low, middle, high = statistics.quantiles(more, n=4)
    medians = ", ".join(f"{arm} {statistics.median(found):.3f}" for arm, found in ms.items())
    share = statistics.median(a / b for a, b in zip(*ms.values(), strict=True))
    print(
        f"{num_streams} streams, {args.turns} turns, ms a token: {medians}; serve takes "
        f"{middle:.3f} more (quartiles "
        f"{low:.3f}, {high:.3f}), and has {share:.3f} of the engine's tokens/s",
        flush=True,
    )
    return {"streams": num_streams, "ms": ms}


def main() -> None:
    """Measure the arms one after the other, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--spelled", action="store_true", help="every id of the model is a word")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, help="pairs of answers of engine and serve")
    parser.add_argument("--profile", nargs="*", type=int, default=[], metavar="STREAMS")
    parser.add_argument("--env", nargs="*", default=[], help="NAME=VALUE for moeyard serve")
    parser.add_argument("--label", default="", help="what is special about this run")
    parser.add_argument("--write", metavar="NAME", help="write results/NAME.json")
    args = parser.parse_args()
    results = []

    def note(arm: str, num_streams: int, result: dict[str, Any]) -> None:
        results.append({"arm": arm, "streams": num_streams, **result})
        print(line(arm, num_streams, result), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "demo-shape")
        if args.model is None:
            write_demo_model(Path(model))
        elif args.spelled:
            model = str(Path(folder) / "spelled")
            write_spelled(Path(args.model), Path(model))
        if args.turns is not None:
            results = [take_turns(model, num_streams, args) for num_streams in args.streams]
            args.arms = []
        if "engine" in args.arms:
            for num_streams in [n for _ in range(args.rounds) for n in args.streams]:
                note(
                    "engine",
                    num_streams,
                    bare_engine(model, num_streams, args.tokens, args.threads),
                )
        for arm, start, options in (("app", app, {}), ("serve", serve, _pairs(args.env))):
            if arm not in args.arms:
                continue
            with start(model, max(args.streams), args.threads, **options) as (port, pids):
                name = Path(model).name
                print(f"{arm}: ms of CPU in a second without requests: {idle(pids)}", flush=True)
                ask(port, name, 1, args.tokens, pids)  # warm
                for num_streams in [n for _ in range(args.rounds) for n in args.streams]:
                    note(arm, num_streams, ask(port, name, num_streams, args.tokens, pids))
                for num_streams in args.profile:
                    show_profile(port, name, num_streams, pids)
    if args.write:
        write_results(args.write, {"label": args.label, "results": results})


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


if __name__ == "__main__":
    main()
