"""Prometheus: ``promtool`` finds no fault in the metrics, and a scrape has the values of the page.

Needs the programs ``prometheus`` and ``promtool`` (Debian's package ``prometheus``).
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from expect import API_KEY, arguments, expect

CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: moeyard
    authorization: {{credentials: "{key}"}}
    static_configs: [{{targets: ["{target}"]}}]
"""
QUERY = "sum(moeyard_expert_tokens_total)"
WAIT_S = 60


def main() -> None:
    base, model, _ = arguments()
    body = {"model": model, "prompt": "import os", "max_tokens": 8}
    get(f"{base}/v1/completions", json.dumps(body).encode())
    page = get(f"{base}/metrics")
    lint = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    expect("what promtool says", (lint.returncode, lint.stderr.decode()), (0, ""))
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    counts = [line for line in lines if line.startswith("moeyard_expert_tokens_total{")]
    wanted = sum(float(line.rpartition(" ")[2]) for line in counts)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        config.write_text(CONFIG.format(key=API_KEY, target=base.removeprefix("http://")))
        expect("the scraped rows of all experts", scraped(folder, config), wanted)


def scraped(folder: str, config: Path) -> float:
    """Start Prometheus, wait for its first scrape, and return the value of ``QUERY``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
    with (Path(folder) / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
        try:
            return wait_for_value(
                f"http://{address}/api/v1/query?query={urllib.parse.quote(QUERY)}"
            )
        finally:
            server.terminate()
            server.wait()


def wait_for_value(url: str) -> float:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            rows = json.loads(get(url))["data"]["result"]
        except urllib.error.URLError:
            rows = []
        if rows:
            return float(rows[0]["value"][1])
        time.sleep(0.5)
    sys.exit(f"error: Prometheus has no value for {QUERY} after {WAIT_S} s")


def get(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {API_KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


if __name__ == "__main__":
    main()
