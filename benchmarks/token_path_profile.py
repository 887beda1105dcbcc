"""Which parts of the path hold the interpreter: samples of py-spy, sorted by file.

    python benchmarks/token_path_profile.py PID [PID ...] [--seconds 8]

Threads without the interpreter are not sampled, so a system call that gives it up is not seen. A
sample belongs to the first part, from the innermost frame outwards, that one of its files names.
Samples of the engine's thread are counted apart.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

RATE = 400
"""Samples per second."""
PARTS = {
    "hand-over to the loop": ("serving/engine/thread.py",),
    "wording and JSON": (
        "json/",
        "api/chunks.py",
        "api/responses.py",
        "api/chat.py",
        "api/completions.py",
    ),
    "answers' generator": ("api/answers.py",),
    "relay": ("serving/relay/",),
    "response": ("starlette/", "api/answer_stream.py", "api/refusals.py", "api/gate.py", "anyio/"),
    "guard": ("serving/proxy_guard.py", "api/connections.py"),
    "uvicorn": ("uvicorn/",),
    "Ray Serve": ("ray/serve/",),
    "Ray's core": ("ray/", "_raylet", "grpc/"),
    "asyncio": ("asyncio/", "uvloop/"),
}
"""Parts by pieces of their files' paths; the first that fits counts."""


def part_of(stack: str) -> str:
    """Return the part that a stack of py-spy belongs to."""
    frames = stack.split(";")
    if any("engine/engine.py" in frame for frame in frames):
        return "engine"
    for frame in reversed(frames):
        for part, pieces in PARTS.items():
            if any(piece in frame for piece in pieces):
                return part
    return "other"


def profile(pid: int, seconds: float) -> Counter[str]:
    """Sample a process; return its samples by part."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stacks"
        command = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid)]
        command += ["--duration", str(int(seconds)), "--rate", str(RATE), "--format", "raw"]
        command += ["--full-filenames", "--gil", "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        found: Counter[str] = Counter()
        for line in path.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            found[part_of(stack)] += int(count)
    return found


def main() -> None:
    """Print the shares of each process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pids", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=8)
    args = parser.parse_args()
    for pid in args.pids:
        found = profile(pid, args.seconds)
        engine = found.pop("engine", 0)
        total = sum(found.values())
        print(f"process {pid}: {engine} samples of the engine, {total} of the path")
        for part, count in found.most_common():
            print(f"  {part:24} {count / max(total, 1):6.1%}")


if __name__ == "__main__":
    main()
