"""aiperf: a chat benchmark whose token counts are the server's own, checked against the length."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from expect import API_KEY, arguments, expect

REQUESTS, TOKENS = 8, 12


def main() -> None:
    base, model, folder = arguments()
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "aiperf", "profile", "--model", model]
        command += ["--url", base, "--api-key", API_KEY, "--endpoint-type", "chat", "--streaming"]
        command += ["--tokenizer", folder, "--use-server-token-count", "--ui", "none"]
        command += ["--synthetic-input-tokens-mean", "32", "--output-tokens-mean", str(TOKENS)]
        command += ["--extra-inputs", "ignore_eos:true", "--concurrency", "2"]
        command += ["--request-count", str(REQUESTS), "--artifact-dir", output]
        run = subprocess.run(command, cwd=output, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
        report = json.loads((Path(output) / "profile_export_aiperf.json").read_text())
    values = {name: row["avg"] for name, row in report.items() if name.startswith("total_usage")}
    expect("requests", report["completed_request_count"]["avg"], REQUESTS)
    expect("errors", report["request_error_rate"]["avg"], 0)
    expect("tokens of all answers", values["total_usage_completion_tokens"], REQUESTS * TOKENS)
    both = values["total_usage_prompt_tokens"] + values["total_usage_completion_tokens"]
    expect("all tokens", values["total_usage_total_tokens"], both)


if __name__ == "__main__":
    main()
