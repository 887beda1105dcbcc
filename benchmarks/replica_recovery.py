"""How long does it take until a killed replica answers again, and where do the seconds go?

    python benchmarks/replica_recovery.py MODEL_DIR [--times 3] [--write]

Serves a model with one replica and then with two, kills a replica with SIGKILL while nothing else
happens, and reads Ray's logs for what followed. ``answers`` is a request that got its answer, with
one replica. With two it is the moment when Ray's controller takes the new one into service.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from serving_bed import Running, is_written, served

from report import write_results

STAGES = ("noticed", "process", "imports", "model", "in service", "answers")
"""Ray notices the death; the new process is there; it has imported what it needs; the model is
loaded; the controller has taken the replica into service; a request is answered."""
PATTERNS = {
    "noticed": ("controller", r"crashed, marking"),
    "imports": ("replica", r"Started initializing replica"),
    "model": ("replica", r"Finished initializing replica"),
    "in service": ("controller", r"started successfully on node"),
}
SEED = 5
TIMEOUT_S = 180.0


def answers(running: Running, model: str) -> bool:
    """Return whether a request gets its answer."""
    body = f'{{"model": "{model}", "prompt": "a", "max_tokens": 1}}'.encode()
    request = urllib.request.Request(f"{running.base}/v1/completions", data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for(condition) -> float:
    """Return when ``condition`` first held."""
    deadline = time.time() + TIMEOUT_S
    while not condition():
        if time.time() > deadline:
            sys.exit("error: the replica did not come back")
        time.sleep(0.05)
    return time.time()


def kill_one(running: Running, model: str, replicas: int) -> dict[str, float]:
    """Kill a replica; return the seconds from there to each stage."""
    before = set(running.replicas())
    victim = min(before)
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    times = {"process": wait_for(lambda: set(running.replicas()) - before)}
    if replicas == 1:
        times["answers"] = wait_for(lambda: answers(running, model))
    for stage, (who, pattern) in PATTERNS.items():
        wait_for(lambda who=who, pattern=pattern: is_written(running, who, pattern, killed))
        times[stage] = is_written(running, who, pattern, killed)
    times.setdefault("answers", times["in service"])
    return {stage: times[stage] - killed for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--times", type=int, default=3, help="kills for each number of replicas")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    figures, chosen = {}, random.Random(SEED)
    print(f"{'seconds until':<16}" + "".join(f"{stage:>12}" for stage in STAGES), flush=True)
    for replicas in options.replicas:
        with served(options.model, replicas) as running:
            rows = []
            for _ in range(options.times):
                # The server is at rest, its spare worker ready, and Ray's checks at any phase.
                time.sleep(12 + chosen.uniform(0, 5))
                rows.append(kill_one(running, options.model.name, replicas))
                print(f"{replicas} replica(s)    " + _row(rows[-1]), flush=True)
        medians = {s: statistics.median(row[s] for row in rows) for s in STAGES}
        print(f"{'  median':<16}" + _row(medians), flush=True)
        figures[f"{replicas} replicas"] = {"kills": rows, "median": medians}
    if options.write:
        write_results("replica_recovery", {"seconds": figures})


def _row(times: dict[str, float]) -> str:
    return "".join(f"{times[stage]:>12.1f}" for stage in STAGES)


if __name__ == "__main__":
    main()
