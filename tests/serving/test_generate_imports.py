"""What ``moeyard generate`` imports: memory that a model could have is not spent on libraries."""

import subprocess
import sys

from small_model import slots, write_random_model

HEAVY = {"transformers", "ray", "sympy", "triton", "torch._dynamo", "torch._inductor", "rich"}


def test_generate_with_a_store_imports_no_heavy_library(tmp_path):
    write_random_model(tmp_path / "model")
    code = "import sys; from moeyard.cli import main; main(); print(*sys.modules)"
    command = [sys.executable, "-c", code, "generate", str(tmp_path / "model"), "ab"]
    command += ["--max-new-tokens", "4", "--expert-memory", slots(4)]
    done = subprocess.run(command, check=True, capture_output=True)
    imported = set(done.stdout.split(b"\n")[-2].decode().split())
    assert "moeyard.serving.experts.store" in imported
    assert not imported & HEAVY
