"""Does every panel of the shipped dashboards show data?

python benchmarks/watching.py [--hold SECONDS]

Trains configs/train/tiny.yaml with a Prometheus port, exports its first checkpoint, serves that
with a quarter of the experts in memory and an API key, sends requests, lets Prometheus scrape both
with the shipped configuration (ports and interval changed), and asks Prometheus for every query of
every dashboard. Needs the ``prometheus`` program. ``--hold`` keeps all of it running to be looked
at.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import write_results

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from launch import free_port  # noqa: E402

KEY = "a-key-for-this-run"
OBSERVE_S = 60
VARIABLES = {"$__rate_interval": "30s", "$instance": ".*", "$layer": "1"}
"""Values of the variables that Grafana would fill in."""


def main() -> int:
    """Run everything and print the table; 1 when a query of an exported metric has no data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hold", type=float, default=0, help="seconds to keep all running")
    hold = parser.parse_args().hold
    if shutil.which("prometheus") is None:
        sys.exit("error: the program prometheus is not installed; install it and start again.")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        training, serving, prometheus = (free_port() for _ in range(3))
        log = stack.enter_context((folder / "log.txt").open("w"))

        def start(*command: str) -> None:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=os.environ | {"TMPDIR": name}
            )
            stack.callback(end, child)

        python = (sys.executable, "-m")
        run_dir = folder / "run"
        overrides = [f"run_dir={run_dir}", f"monitor.prometheus_port={training}"]
        overrides += ["train.steps=100000", "train.batch_sequences=4", "train.log_every=5"]
        overrides += ["model.moe.router.lookahead=previous_block"]  # so that the server reads ahead
        overrides += ["train.eval_every=50", "train.eval_sequences=8", "checkpoint.every=25"]
        config = str(ROOT / "configs" / "train" / "tiny.yaml")
        start(*python, "moeyard.training", config, *overrides)
        wait_for(lambda: (run_dir / "latest").exists(), "a checkpoint", folder)
        export = [*python, "moeyard.cli", "export", str(run_dir), str(folder / "model")]
        subprocess.run(export, check=True, stdout=log, stderr=log)
        serve = ["serve", str(folder / "model"), "--port", str(serving), "--api-key", KEY]
        start(*python, "moeyard.cli", *serve, "--expert-memory", "25%", "--num-threads", "1")
        wait_for(lambda: ask(f"http://127.0.0.1:{serving}/health") is not None, "server", folder)
        start(*prometheus_command(folder, training, serving, prometheus))
        base = f"http://127.0.0.1:{prometheus}"
        wait_for(lambda: ask(f"{base}/-/ready") is not None, "Prometheus", folder)
        stop = threading.Event()
        stack.callback(stop.set)
        for number in range(3):
            threading.Thread(target=load, args=(serving, number, stop), daemon=True).start()
        time.sleep(OBSERVE_S)
        rows = list(evaluate(base))
        rules = api(base, "rules")["groups"]
        print_table(rows)
        health = {r["health"] for group in rules for r in group["rules"]}
        print(f"{sum(len(g['rules']) for g in rules)} alert rules, health: {sorted(health)}")
        write_results("watching", {"queries": rows, "rules_health": sorted(health)})
        if hold:
            print(f"Prometheus is at {base}, for {hold:.0f} s more", flush=True)
            time.sleep(hold)
    return 1 if any(row["state"] == "no data" for row in rows) else 0


def prometheus_command(folder: Path, training: int, serving: int, port: int) -> list[str]:
    """Write the shipped configuration with this run's ports and key; return the command."""
    shutil.copy(ROOT / "configs" / "prometheus" / "alerts.yml", folder)
    (folder / "key").write_text(KEY)
    text = (ROOT / "configs" / "prometheus" / "prometheus.yml").read_text()
    for old, new in (
        ("127.0.0.1:9401", f"127.0.0.1:{training}"),
        ("127.0.0.1:8000", f"127.0.0.1:{serving}"),
        ("scrape_interval: 5s", "scrape_interval: 2s"),
        ("evaluation_interval: 15s", "evaluation_interval: 5s"),
        ("# authorization:", "authorization:"),
        ("#   credentials_file: /etc/prometheus/moeyard-api-key", "  credentials_file: key"),
    ):
        assert old in text, f"prometheus.yml has no {old!r}"
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb"]
    return [*command, f"--web.listen-address=127.0.0.1:{port}"]


def load(port: int, number: int, stop: threading.Event) -> None:
    """Ask for completions until told to stop; every fourth client leaves in the middle."""
    turn = number
    while not stop.is_set():
        turn += 1
        leaves = turn % 4 == 0
        body = {"model": "model", "prompt": f"def f{turn}(", "max_tokens": 40, "stream": leaves}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
            answer.read(200 if leaves else None)


def evaluate(base: str) -> Iterator[dict[str, Any]]:
    """Ask Prometheus for each query of each dashboard."""
    known = set(api(base, "label/__name__/values"))
    for path in sorted((ROOT / "configs" / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                query = target["expr"]
                for variable, value in VARIABLES.items():
                    query = query.replace(variable, value)
                yield {
                    "dashboard": path.stem,
                    "panel": panel["title"],
                    "query": target["expr"],
                    **outcome(base, query, known),
                }


def outcome(base: str, query: str, known: set[str]) -> dict[str, Any]:
    """Return how many series have a number now, and the first of them."""
    series = api(base, "query", query=query)["result"]
    numbers = [float(s["value"][1]) for s in series if s["value"][1] != "NaN"]
    if numbers:
        return {"state": "data", "series": len(numbers), "first": numbers[0]}
    words = query.replace("{", " ").replace("(", " ").split()
    missing = [w for w in words if w.startswith("moeyard_") and w not in known]
    state = f"not exported: {missing[0]}" if missing else "no data"
    return {"state": state, "series": 0, "first": None}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each query."""
    print(f"{'dashboard':10}{'panel':42}{'series':>7}{'first':>14}  state")
    for row in rows:
        first = "-" if row["first"] is None else f"{row['first']:.4g}"
        head = f"{row['dashboard']:10}{row['panel']:42}{row['series']:7}{first:>14}"
        print(f"{head}  {row['state']}")
    with_data = sum(row["state"] == "data" for row in rows)
    print(f"{with_data} of {len(rows)} queries have data")


def api(base: str, path: str, **parameters: str) -> Any:
    """Call Prometheus' HTTP API and return the data."""
    text = ask(f"{base}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
    assert text is not None, f"Prometheus refused {path} {parameters}"
    return json.loads(text)["data"]


def ask(url: str) -> bytes | None:
    """Return what is at ``url``, or None without a good answer."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content: bytes = answer.read()
            return content
    except (urllib.error.URLError, OSError):
        return None


def wait_for(condition: Callable[[], bool], what: str, folder: Path, limit_s: float = 300) -> None:
    """Wait until ``condition`` holds; end with the log otherwise."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"no {what} within {limit_s} s\n{(folder / 'log.txt').read_text()[-3000:]}")
        time.sleep(0.2)


def end(child: subprocess.Popen) -> None:
    """Stop a process we started."""
    child.terminate()
    try:
        child.wait(60)
    except subprocess.TimeoutExpired:
        child.kill()


if __name__ == "__main__":
    sys.exit(main())
