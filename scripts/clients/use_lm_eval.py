"""lm-eval through the server (``local-completions``): the figures of its own ``hf`` model.

Three tasks, one of each kind of request: the likelihood of choices, of whole texts, and answers.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from expect import API_KEY, arguments, expect

TASKS = Path(__file__).parent / "tasks"
NAMES = ["moeyard_pick", "moeyard_roll", "moeyard_answer"]
FIGURES = ["acc,none", "bits_per_byte,none", "exact_match,none"]
DIGITS = 5
"""Bits per byte agree to these; sums in fp32 differ in the last places."""


def main() -> None:
    base, name, folder = arguments()
    served = f"base_url={base}/v1/completions,model={name},tokenizer={folder},num_concurrent=4"
    own = f"pretrained={folder},dtype=float32"
    through_server = evaluate("local-completions", f"{served},max_length=512")
    of_its_own = evaluate("hf", f"{own},max_length=512")
    expect("the figures and answers", through_server, of_its_own)


def evaluate(model: str, model_args: str) -> list[Any]:
    """Return the rounded figures of all tasks, and the answers that were written."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", model]
        command += ["--model_args", model_args, "--tasks", ",".join(NAMES), "--device", "cpu"]
        command += ["--include_path", str(TASKS), "--output_path", output, "--log_samples"]
        env = os.environ | {"OPENAI_API_KEY": API_KEY, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, cwd=TASKS, env=env, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr[-2000:])
        (results,) = Path(output).rglob("results_*.json")
        figures = json.loads(results.read_text())["results"]
        (samples,) = Path(output).rglob("samples_moeyard_answer_*.jsonl")
        answers = [json.loads(line)["resps"] for line in samples.read_text().splitlines()]
    values = zip(NAMES, FIGURES, strict=True)
    return [*(round(figures[task][figure], DIGITS) for task, figure in values), answers]


if __name__ == "__main__":
    main()
