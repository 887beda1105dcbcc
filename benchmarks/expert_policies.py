"""How far is each cache policy from Belady's bound on text that a trained model never saw?

    python benchmarks/expert_policies.py MODEL TEXT... [--work DIR] [--sequences 64]

MODEL is a model folder with byte tokens, and TEXT are held-out files. Windows of the texts, by
turns, are read as a server would: 64 bytes of prompt, then 192 single bytes, one sequence at a time
and four at a time. Routes are recorded once. Policies are judged on the second half of the forwards
with an empty store; those that learn from a file learn on the first half.
"""

import argparse
from pathlib import Path

import torch

import moeyard
from moeyard.moe.batch import batch_of
from moeyard.moe.models.language_model import LanguageModel
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.serving.experts.recorded import read_forwards
from moeyard.serving.experts.replay.comparison import Comparison, Setting

from report import write_results

PROMPT, WINDOW = 64, 256
SHARES = (0.10, 0.25, 0.50)
TARGET = 1.2


def windows(files: list[Path], number: int) -> list[torch.Tensor]:
    """Return evenly spaced windows of the texts, one text after the other."""
    found = []
    texts = [file.read_bytes() for file in files]
    for place in range(number // len(texts)):
        for text in texts:
            start = (len(text) - WINDOW) * place // max(1, number // len(texts) - 1)
            found.append(torch.tensor(list(text[start : start + WINDOW])))
    return found


@torch.inference_mode()
def record(model: LanguageModel, texts: list[torch.Tensor], batch: int, path: Path) -> None:
    """Let the model read texts, ``batch`` at a time."""
    with recording(model.decoder, path, "benchmark"):
        for first in range(0, len(texts), batch):
            group = texts[first : first + batch]
            caches = [model.decoder.new_cache(WINDOW) for _ in group]
            steps = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, WINDOW))]
            for start, end in steps:
                for cache in caches:
                    cache.reserve(end - start)
                model.decoder(batch_of([text[start:end] for text in group], caches))


def compare(path: Path) -> list[dict]:
    """Replay every policy at every budget; print and return the outcomes."""
    file = RouteFile(path)
    comparison = Comparison(file.header, read_forwards([file]), held_out=0.5)
    found = []
    names = comparison.policies(["all"])
    print(f"{'':13}" + "".join(f"{share:>24.0%}" for share in SHARES))
    print(f"{'policy':13}" + f"{'hits':>8} {'misses':>8} {'gap':>6}" * len(SHARES))
    for name in names:
        line = f"{name:13}"
        for share in SHARES:
            num_slots = int(share * comparison.num_experts)
            outcome = comparison.run(Setting(name, "none", num_slots), slot_bytes=1, pace=None)
            needs = outcome.counters.hits + outcome.counters.misses
            rate = outcome.counters.hits / needs
            line += f"{rate:8.1%} {outcome.counters.misses:8} {outcome.gap:6.3f}"
            found.append({**outcome.as_dict(), "share": share, "hit_rate": rate})
        print(line, flush=True)
    for share in SHARES:
        best = min(
            (o for o in found if o["share"] == share and o["policy"] != "belady"),
            key=lambda o: o["gap"],
        )
        says = "reaches" if best["gap"] <= TARGET else "misses"
        print(f"{share:.0%}: best is {best['policy']}, {best['gap']:.3f}: {says} {TARGET}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/expert-policies"))
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = moeyard.load(arguments.model)
    print(repr(model))
    figures = {}
    for batch in (1, 4):
        path = arguments.work / f"batch-{batch}.routes"
        if not path.exists():
            record(
                model, windows(arguments.texts, arguments.sequences * min(2, batch)), batch, path
            )
        print(f"\n{batch} sequence{'s' * (batch > 1)} at a time")
        figures[f"batch_{batch}"] = compare(path)
    print(f"written to {write_results('expert_policies', figures).name}")


if __name__ == "__main__":
    main()
