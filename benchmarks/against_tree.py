"""Is this tree as fast as another one? Decoding, a layer and a training step, in turns.

    python benchmarks/against_tree.py OTHER_TREE [--pairs 5]

Each turn is a fresh process of one tree, with its own .venv, on all cores: first one tree, then
the other, the order alternating from pair to pair. Only public names are used, so that the same
program runs on both. Figures are seconds: the ratio is this tree's over the other's, and below 1 is
faster. "Slower" needs the whole interval of the ratios above 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_results

HERE = Path(__file__).parent.parent

MODEL = """
import sys
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=4096, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, moe_intermediate_size=256, num_experts=32,
    num_experts_per_tok=4, decoder_sparse_step=1, max_position_embeddings=1024,
    tie_word_embeddings=False,
)
Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(sys.argv[1])
"""

MEASURE = """
import json, sys, time
from statistics import median
import torch
import moeyard

def timed(call, rounds):
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)

figures = {}
ids_BT = torch.arange(32).unsqueeze(0)
for name, memory in (("all in memory", None), ("half in memory", "50%")):
    model = moeyard.load(sys.argv[1], dtype="bfloat16", expert_memory=memory)
    decode = lambda: model.generate(ids_BT, max_new_tokens=96, temperature=0)
    figures[f"decode 96 tokens, experts {name}"] = timed(decode, 5)
for dtype in (torch.float32, torch.bfloat16):
    layer = moeyard.MoELayer(512, 256, 32, moeyard.TopK(k=4)).to(dtype)
    layer.gate.float()
    for tokens, rounds in ((1, 300), (16, 100), (1024, 12)):
        x = torch.randn(tokens, 512).to(dtype).requires_grad_()
        def both():
            y, _ = layer(x)
            y.sum().backward()
        def forward():
            with torch.no_grad():
                layer.eval()(x)
                layer.train()
        kind = str(dtype).removeprefix("torch.")
        figures[f"layer {kind} forward, {tokens} tokens"] = timed(forward, rounds)
        figures[f"layer {kind} forward and backward, {tokens} tokens"] = timed(both, rounds)
json.dump(figures, sys.stdout)
"""


def measure(tree: Path, model: Path, folder: Path) -> dict[str, float]:
    """Return the figures of one turn."""
    python = str(tree / ".venv" / "bin" / "python")
    figures = json.loads(_run(tree, [python, "-c", MEASURE, str(model)]))
    for precision in ("fp32", "bf16"):
        run = folder / f"run-{precision}"
        config = str(tree / "configs" / "train" / "tiny.yaml")
        options = [f"run_dir={run}", "train.steps=24", "train.log_every=1"]
        options += ["train.eval_sequences=16", f"train.precision={precision}"]
        _run(tree, [python, "-m", "moeyard.training", config, *options])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step_s"] for record in records[4:] if "step_s" in record]
        figures[f"training step {precision}, tiny.yaml"] = statistics.median(steps)
    return figures


def _run(tree: Path, command: list[str]) -> str:
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: a turn of {tree.name} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    trees = {"other": arguments.other.resolve(), "this": HERE}
    found: dict[str, list[dict[str, float]]] = {"other": [], "this": []}
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        _run(HERE, [sys.executable, "-c", MODEL, str(model)])
        for pair in range(arguments.pairs):
            for name in ("other", "this") if pair % 2 == 0 else ("this", "other"):
                turn = Path(folder) / f"{name}-{pair}"
                found[name].append(measure(trees[name], model, turn))
            print(f"pair {pair + 1} of {arguments.pairs}", flush=True)
    table = {}
    for key in found["this"][0]:
        other, ours = ([turn[key] for turn in found[name]] for name in ("other", "this"))
        ratios = sorted(b / a for a, b in zip(other, ours, strict=True))
        table[key] = {"other_s": other, "this_s": ours, "ratios": ratios}
        verdict = "SLOWER" if ratios[0] > 1 else ""
        times = [f"{statistics.median(turns) * 1e3:9.3f} ms" for turns in (other, ours)]
        span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{key:52} {' '.join(times)}  ratio {span} {verdict}", flush=True)
    write_results("against_tree", {"table": table})


if __name__ == "__main__":
    main()
