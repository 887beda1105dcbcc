"""Is anything lost when replicas are replaced or killed under load?

    python benchmarks/serve_resilience.py MODEL_DIR [--write]

Two replicas on Ray Serve and eight clients that never stop asking: four whole answers with one
retry (the openai client), four streams without (httpx). Meanwhile the application is deployed
again, both replicas are killed with SIGKILL one after the other, and it is deployed twice with no
time to finish. Requests count for the phase they end in. Fails when a whole answer is lost, when a
stream ends without an event that says why and [DONE], or when the first deployment cuts a stream.
"""

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray reads these when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import httpx
import openai
import ray
from ray import serve

from moeyard.serving.app import application
from moeyard.serving.proxy_guard import ask_for_guard
from moeyard.serving.serve_args import ServeArgs

from report import write_results

CLIENTS = 4
"""Clients of each kind."""
QUIET_S = 4.0
"""Seconds of load before and after each event."""
OPTIONS = {"prompt": "hello 1", "temperature": 0}
WHOLE_TOKENS, STREAM_TOKENS = 120, 1500


@dataclass
class Load:
    """Clients that send requests until told to stop, and the outcomes of their requests."""

    base: str
    model: str
    phase: str = "before"
    outcomes: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        kinds = [self._whole] * CLIENTS + [self._stream] * CLIENTS
        self._threads = [threading.Thread(target=self._repeat, args=(kind,)) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, ask) -> None:
        while not self._stopping.is_set():
            kind, outcome, problem = ask()
            with self._lock:
                phase = self.phase  # the phase in which it ended, because that may be the cause
                self.outcomes[phase, kind, outcome] += 1
                if problem:
                    self.problems.append(f"{phase}: {kind}: {problem}")

    def _whole(self) -> tuple[str, str, str]:
        client = openai.OpenAI(base_url=f"{self.base}/v1", api_key="none", max_retries=1)
        try:
            raw = client.completions.with_raw_response.create(
                model=self.model, max_tokens=WHOLE_TOKENS, **OPTIONS
            )
        except openai.OpenAIError as error:
            return "whole", "lost", repr(error)
        answer = raw.parse()
        if answer.choices[0].finish_reason is None:
            return "whole", "lost", "no finish_reason"
        return "whole", "answered after a retry" if raw.retries_taken else "answered", ""

    def _stream(self) -> tuple[str, str, str]:
        body = {"model": self.model, "max_tokens": STREAM_TOKENS, "stream": True, **OPTIONS}
        events: list[str] = []
        try:
            with httpx.stream(
                "POST", f"{self.base}/v1/completions", json=body, timeout=120
            ) as response:
                if response.status_code != 200:
                    return "stream", f"refused with {response.status_code}", ""
                events += [line.removeprefix("data: ") for line in response.iter_lines() if line]
        except httpx.HTTPError as error:
            return "stream", "cut silently", repr(error)
        if events[-1] != "[DONE]":
            return "stream", "cut silently", events[-1]
        last = json.loads(events[-2])
        if "error" in last:
            return "stream", "ended with an error event", ""
        if last["choices"][0]["finish_reason"] is None:
            return "stream", "cut silently", events[-2]
        return "stream", "finished", ""


def replicas() -> set[int]:
    """Return the process ids of this program's replicas."""
    rows = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    fields = (row.split(None, 2) for row in rows)
    parents = {int(pid): (int(parent), args) for pid, parent, args in fields}
    found = set()
    for pid, (parent, args) in parents.items():
        while parent in parents and parent != os.getpid():
            parent = parents[parent][0]
        if parent == os.getpid() and args.startswith("ray::ServeReplica"):
            found.add(pid)
    return found


def deploy(args: ServeArgs) -> None:
    serve.run(application(args), name="moeyard", route_prefix="/", blocking=False)


def wait_for(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("error: the replicas did not come back")
        time.sleep(0.2)


def redeploy(args: ServeArgs) -> None:
    """Deploy again and wait until every replica is another one."""
    old = replicas()
    deploy(args)
    wait_for(lambda: len(replicas() - old) == 2 and not replicas() & old)


def kill_each(_: ServeArgs) -> None:
    """Kill one replica, wait until there are two again, and kill the other."""
    for victim in sorted(replicas()):
        others = replicas() - {victim}
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(replicas() - others - {victim}) == 1)  # noqa: B023 (called immediately)
        time.sleep(QUIET_S)


def start(args: ServeArgs) -> Load:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ask_for_guard()
    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy(args)
    base = f"http://127.0.0.1:{port}"
    wait_for(lambda: httpx.get(f"{base}/health", timeout=30).status_code == 200)
    return Load(base, args.model_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    base: dict[str, Any] = {
        "model": str(options.model.resolve()),
        "num_replicas": 2,
        "num_threads": 1,
    }
    first = ServeArgs(**base)
    events = [
        ("rolling redeploy", redeploy, ServeArgs(**base, max_queued_requests=65)),
        ("kill -9 of each replica", kill_each, first),
        ("redeploy, no time to finish", redeploy, ServeArgs(**base, drain_timeout=0.0)),
        ("the same again", redeploy, ServeArgs(**base, drain_timeout=0.0, max_queued_requests=66)),
    ]
    order_of_phase = ["before", *(name for name, _, _ in events), "after"]

    def order(row: Any) -> tuple[int, str, str]:
        (phase, kind, outcome), _ = row
        return order_of_phase.index(phase), kind, outcome

    load = start(first)
    try:
        time.sleep(QUIET_S)
        for name, event, args in events:
            load.phase = name
            event(args)
            time.sleep(QUIET_S)
        load.phase = "after"
        time.sleep(QUIET_S)
    finally:
        load.stop()
        serve.shutdown()
        ray.shutdown()
    lines = [f"{'phase':<30}{'kind':<8}{'outcome':<28}{'requests':>8}"]
    for (phase, kind, outcome), count in sorted(load.outcomes.items(), key=order):
        lines.append(f"{phase:<30}{kind:<8}{outcome:<28}{count:>8}")
    bad = sum(n for (_, _, what), n in load.outcomes.items() if what in ("lost", "cut silently"))
    cut = load.outcomes[events[0][0], "stream", "ended with an error event"]
    lines.append(f"lost or cut silently: {bad} of {load.outcomes.total()}")
    lines.append(f"streams ended by a redeploy with time to finish: {cut}")
    lines += load.problems
    print("\n".join(lines))
    if options.write:
        rows = [[*key, count] for key, count in load.outcomes.items()]
        write_results(
            "serve_resilience",
            {"question": "is anything lost when replicas are replaced or killed", "outcomes": rows},
        )
    sys.exit(1 if bad or cut else 0)


if __name__ == "__main__":
    main()
