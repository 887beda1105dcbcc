"""Does a server hold under load: too many requests, killed replicas, clients that leave?

    python benchmarks/serving.py MODEL_DIR overload|kills|cancels [--full] [--write]

``overload`` measures what two replicas answer at most (as many clients as both batches hold and
half as many again), and then sends twice as many requests at fixed times, whatever happens to
them. ``kills`` ends one of two replicas with SIGKILL every so often, never the last one, under
clients that try again for 120 s and streams that do not. ``cancels`` leaves requests at every
moment of their lives. Short by default; ``--full`` runs 5 minutes of overload, 10 minutes of kills
and 10,000 cancellations.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

import proxy_memory
from serving_bed import served, wait_for_zero
from serving_cancels import cancels
from serving_kills import kills
from serving_overload import overload, with_locust

from moeyard.serving.proxy_guard import CALLBACK_VARIABLE

from report import write_results

SHORT = {"overload": 60.0, "kills": 100.0, "cancels": 1500}
FULL = {"overload": 300.0, "kills": 600.0, "cancels": 10_000}


def is_good(kind: str, found: dict) -> bool:
    """True where what must hold has held; latencies and rates are only reported."""
    if kind == "overload":
        return found["lost"] == 0 and found["outcomes"].get("429", 0) > 0
    if kind == "kills":
        return (
            found["kills"] > 0 and found["cut_in_silence"] == 0 and found["answered_share"] >= 0.999
        )
    return not found["not_zero"] and set(found["afterwards"]) == {"200"}


def watch_proxy(file: Path, traces: bool) -> None:
    """Have Ray's proxy of a server that starts later write what it holds into a file."""
    file.unlink(missing_ok=True)
    os.environ[CALLBACK_VARIABLE] = proxy_memory.CALLBACK
    os.environ[proxy_memory.FILE], os.environ[proxy_memory.TRACE] = str(file), str(int(traces))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("kind", choices=sorted(SHORT))
    parser.add_argument("--full", action="store_true", help="5 or 10 minutes, or 10,000")
    parser.add_argument("--seconds", type=float, help="of overload or kills")
    parser.add_argument("--cancels", type=int, help="how many requests to leave")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    parser.add_argument("--locust", type=Path, metavar="FOLDER", help="send with locust from there")
    parser.add_argument("--proxy-memory", type=Path, metavar="FILE", help="say what grows there")
    parser.add_argument("--trace-memory", action="store_true", help="with lines of code")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    length = (FULL if options.full else SHORT)[options.kind]
    length = options.seconds or options.cancels or length
    if options.proxy_memory is not None:
        watch_proxy(options.proxy_memory.resolve(), options.trace_memory)
    with served(options.model, 2) as running:
        if options.locust is not None:
            with_locust(running, options.model.name, length, options.locust)
            return
        work = {
            "overload": lambda: overload(running, options.model.name, length),
            "kills": lambda: kills(running, options.model.name, length, options.every),
            "cancels": lambda: cancels(running, options.model.name, int(length)),
        }
        found = asyncio.run(work[options.kind]())
        left = wait_for_zero(running)
        print(f"after it, requests that run or wait: {left or 'none'}")
    if options.proxy_memory is not None:
        print("\n".join(proxy_memory.growth(options.proxy_memory)))
    if options.write:
        write_results(f"serving_{options.kind}", {"length": length, **found})
    sys.exit(0 if is_good(options.kind, found) and not left else 1)


if __name__ == "__main__":
    main()
