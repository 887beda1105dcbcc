"""locust: four users at once for five seconds; every answer is the first one, none fails.

This file is a locustfile as well: locust imports it and finds ``Reader``.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from expect import API_KEY, arguments, expect
from locust import HttpUser, constant, task


class Reader(HttpUser):
    """Asks for the same greedy completion again and again."""

    wait_time = constant(0.05)
    first: str | None = None

    @task
    def complete(self) -> None:
        body = {"model": os.environ["MODEL"], "prompt": "import os", "max_tokens": 8}
        with self.client.post(
            "/v1/completions",
            json=body | {"temperature": 0},
            headers={"Authorization": f"Bearer {API_KEY}"},
            catch_response=True,
        ) as answer:
            text = answer.json()["choices"][0]["text"] if answer.ok else None
            if Reader.first is None:
                Reader.first = text
            if text is None or text != Reader.first:
                answer.failure(f"status {answer.status_code}, text {text!r}")


def main() -> None:
    base, model, _ = arguments()
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "locust", "-f", __file__, "--headless"]
        command += ["--host", base, "--users", "4", "--spawn-rate", "4", "--run-time", "5s"]
        env = os.environ | {"MODEL": model}
        run = subprocess.run(
            [*command, "--csv", f"{output}/load"], env=env, capture_output=True, text=True
        )
        if run.returncode:
            sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
        *_, total = csv.DictReader((Path(output) / "load_stats.csv").open())
    expect("failures", total["Failure Count"], "0")
    expect("ten answers or more", int(total["Request Count"]) >= 10, True)


if __name__ == "__main__":
    main()
