"""guidellm: a chat benchmark with synthetic prompts; every answer has the length asked for."""

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
        report = Path(output) / "report.json"
        backend = f"kind=openai_http,target={base},model={model},api_key={API_KEY}"
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
        command += ["--backend", f"{backend},request_format=/v1/chat/completions"]
        command += ["--profile", "kind=concurrent,streams=2"]
        command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={folder}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}"]
        run = subprocess.run(
            [*command, "--output", f"kind=json,path={report}"], capture_output=True, text=True
        )
        if run.returncode:
            sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
        metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    requests, lengths = metrics["request_totals"], metrics["output_token_count"]["successful"]
    expect("requests", (requests["successful"], requests["errored"]), (REQUESTS, 0))
    expect("tokens of an answer", (lengths["min"], lengths["max"]), (TOKENS, TOKENS))


if __name__ == "__main__":
    main()
