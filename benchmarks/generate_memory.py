"""How much memory does ``moeyard generate`` take next to weights and slots?

    python benchmarks/generate_memory.py MODEL_DIR [--limits 250 200 180]

Measured on a small model, whose weights are taken off. First the process's resident memory at its
peak: anonymous memory is its own; file-mapped memory is code of libraries, which all processes
share and which the kernel may drop. Then, as root, tokens per second in cgroups whose limit in MB
counts both, and the page cache.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from offloading_arms import Sizes
from offloading_bed import Limits, NoGroupsError, run

CODE = """
import json, sys
from pathlib import Path
from moeyard.cli import main
status = main()
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
names = ("VmHWM", "RssAnon", "RssFile")
found = {name: int(lines[name].split()[0]) * 1024 for name in names}
heavy = ("transformers", "ray", "torch._dynamo", "sympy", "triton", "rich")
found["heavy_imports"] = [name for name in heavy if name in sys.modules]
print()
print(json.dumps(found))
sys.exit(status)
"""


def command_of(folder: Path) -> list[str]:
    """Return a run of generate that reports its memory on the last line."""
    command = [sys.executable, "-c", CODE, "generate", str(folder), "ab", "--seed", "0"]
    return [*command, "--max-new-tokens", "64", "--expert-memory", "50%", "--ignore-eos"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limits", type=int, nargs="*", default=[250, 200, 180], help="MB")
    arguments = parser.parse_args()
    sizes = Sizes.of(arguments.folder)
    weights = sizes.dense + sizes.experts // 2
    command = command_of(arguments.folder)
    done = subprocess.run(command, check=True, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"weights and slots: {weights / 1e6:.1f} MB, taken off below")
    resident, anonymous = found["VmHWM"] - weights, found["RssAnon"] - weights
    mapped = found["RssFile"]
    print(
        f"resident at its peak: {resident / 1e6:.0f} MB, of which anonymous "
        f"{anonymous / 1e6:.0f}, mapped code {mapped / 1e6:.0f}"
    )
    print(f"heavy libraries imported: {', '.join(found['heavy_imports']) or 'none'}")
    for limit in arguments.limits:
        try:
            outcome = run(command, Limits(None, int(limit * 1e6) + weights), arguments.folder)
        except NoGroupsError as error:
            print(f"no limits: {error}")
            return
        line = outcome.problem or f"finished in {outcome.seconds:.1f} s"
        print(f"limit {limit} MB + weights, page cache included: {line}", flush=True)


if __name__ == "__main__":
    main()
