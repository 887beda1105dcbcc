"""Run the clients people use, unchanged, against a server: one line for each, 1 if one fails.

    python scripts/clients/run.py BASE_URL MODEL TOKENIZER_FOLDER --venvs FOLDER [--only NAME ...]

Each client gets a virtual environment in FOLDER, made when it is missing (5 GB in all, mostly for
lm-eval and guidellm). ``OPENAI_API_KEY`` is the server's key. The model needs a chat template.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
"""Named first where a client asks for torch, so that pip does not take the largest build."""
PACKAGES = {
    "openai": ["openai==3.57.0"],
    "langchain": ["langchain-openai==1.7.4"],
    "litellm": ["litellm==1.110.2"],
    "lm_eval": [TORCH, "lm-eval[api,hf]==0.4.13"],
    "guidellm": [TORCH, "guidellm==0.8.1"],
    "aiperf": ["aiperf==0.13.0"],
    "locust": ["locust==2.47.0"],
}
"""What each script needs from the package index."""
PROGRAMS = {"curl": "use_curl.sh", "prometheus": "use_prometheus.py"}
"""Programs of the system, and the scripts that use them."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base_url", help="for example http://127.0.0.1:8000")
    parser.add_argument("model", help="name the server gives it")
    parser.add_argument("tokenizer", type=Path, help="folder with the model's tokenizer")
    parser.add_argument("--venvs", type=Path, required=True, help="folder for the environments")
    names = [*PACKAGES, *PROGRAMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all")
    args = parser.parse_args()
    server = [args.base_url, args.model, str(args.tokenizer.resolve())]
    outcomes = [run(name, server, args.venvs.resolve()) for name in args.only]
    return 0 if all(outcomes) else 1


def run(name: str, server: list[str], venvs: Path) -> bool:
    """Run one client's script, print a line, and return whether it passed."""
    if name in PACKAGES:
        command = [str(environment(venvs / name, PACKAGES[name])), str(HERE / f"use_{name}.py")]
        version = PACKAGES[name][-1].partition("==")[2]
    else:
        script = HERE / PROGRAMS[name]
        command = ([sys.executable] if script.suffix == ".py" else []) + [str(script)]
        version = program_version(name)
    started = time.monotonic()
    done = subprocess.run([*command, *server], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    print(
        f"{name:<12}{version:<12}{seconds:6.1f} s  {'ok' if done.returncode == 0 else 'FAILED'}",
        flush=True,
    )
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-4000:], flush=True)
    return done.returncode == 0


def environment(folder: Path, packages: list[str]) -> Path:
    """Return the interpreter of an environment with these packages; make it when it is missing."""
    python, done = folder / "bin" / "python", folder / "packages.txt"
    if done.exists() and done.read_text().split() == packages:
        return python
    print(f"installing {' '.join(packages)} into {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    for package in packages:
        subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    done.write_text("\n".join(packages))
    return python


def program_version(name: str) -> str:
    """Return the version of a program of the system, or end with what to install."""
    if shutil.which(name) is None:
        sys.exit(
            f"error: the program {name} is not installed; install it, or leave it out with --only."
        )
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
    return found.group() if found else "?"


if __name__ == "__main__":
    raise SystemExit(main())
