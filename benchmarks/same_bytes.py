"""Do two trees train, export and generate the same bytes?

    python benchmarks/same_bytes.py OTHER_TREE

Each tree, with its own .venv, trains configs/train/tiny.yaml for 50 steps on one process, and the
demo's configuration on two ranks with experts split between them; exports both; and continues a
prompt greedily with each export, with all experts in memory and with a quarter of them. The hashes
of every exported file and the generated ids are compared.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_results

HERE = Path(__file__).parent.parent
RUNS = {
    "tiny, 50 steps, 1 process": ("tiny.yaml", 1, ["train.steps=50"]),
    "demo, 2 ranks": ("demo.yaml", 2, []),
}
PROMPTS = ("def __init__(self", "import os\nimport sys\n\n", "class ")
NEW_TOKENS = 96

GENERATE = """
import json, sys
import torch
import moeyard
found = {}
for memory in (None, "25%"):
    model = moeyard.load(sys.argv[1], expert_memory=memory)
    for prompt in json.loads(sys.argv[2]):
        ids_BT = torch.tensor([list(prompt.encode())])
        out_BT = model.generate(ids_BT, max_new_tokens=int(sys.argv[3]), temperature=0)
        found[f"{prompt!r}, expert memory {memory}"] = out_BT[0].tolist()
json.dump(found, sys.stdout)
"""


def outcome(tree: Path, folder: Path) -> dict[str, object]:
    """Return the hashes of all exported files and the generated ids of one tree."""
    python = tree / ".venv" / "bin" / "python"
    found: dict[str, object] = {}
    for name, (config, ranks, overrides) in RUNS.items():
        run, export = folder / f"run-{ranks}", folder / f"export-{ranks}"
        starter = [str(python), "-m"]
        if ranks > 1:
            torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m")
            starter = [*starter, *torchrun]
        config_path = str(tree / "configs" / "train" / config)
        _run(tree, [*starter, "moeyard.training", config_path, f"run_dir={run}", *overrides], ranks)
        command = "from moeyard.cli import main; main()"
        _run(tree, [str(python), "-c", command, "export", str(run), str(export)], 1)
        for path in sorted(export.iterdir()):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[f"{name}: {path.name}"] = digest[:16]
        arguments = [str(export), json.dumps(PROMPTS), str(NEW_TOKENS)]
        text = _run(tree, [str(python), "-c", GENERATE, *arguments], 1)
        found |= {f"{name}: {key}": ids for key, ids in json.loads(text).items()}
    return found


def _run(tree: Path, command: list[str], ranks: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command[:6])} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def main() -> None:
    trees = [Path(sys.argv[1]).resolve(), HERE]
    outcomes = []
    for tree in trees:
        with tempfile.TemporaryDirectory() as folder:
            print(f"training, exporting and generating with {tree.name}", flush=True)
            outcomes.append(outcome(tree, Path(folder)))
    other, ours = outcomes
    same = {key: other.get(key) == ours.get(key) for key in sorted({*other, *ours})}
    for key, is_same in same.items():
        print("same     " if is_same else "DIFFERENT", key)
    write_results("same_bytes", {"same": same})
    if not all(same.values()):
        sys.exit("error: the trees differ")
    print(f"all {len(same)} are the same")


if __name__ == "__main__":
    main()
