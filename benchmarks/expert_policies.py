"""How far is each cache policy from Belady's bound on text that a trained model never saw?

    python benchmarks/expert_policies.py MODEL TEXT... [--work DIR] [--sequences 64]

MODEL is a model folder with byte tokens, and TEXT are held-out files. Windows of the texts, by
turns, are read as a server would: 64 bytes of prompt, then 192 single bytes, one sequence at a time
and four at a time. Routes are recorded once. Policies are judged on the second half of the forwards
with an empty store; those that learn from a file learn on the first half. ``sees N`` is no policy
but a measure of what can be known: it knows exactly what each layer's next N forwards need, and
beyond that what future_use predicts.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import moeyard
from moeyard.moe.batch import batch_of
from moeyard.moe.models.language_model import LanguageModel
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.policies.future_use import FutureUse
from moeyard.serving.experts.policies.policy import CacheFacts, Key
from moeyard.serving.experts.recorded import read_forwards
from moeyard.serving.experts.replay.comparison import Comparison, Setting
from moeyard.serving.experts.replay.run import replay

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


class Seer(FutureUse):
    """Knows the next needs of each layer; an earlier one counts more than all later ones."""

    def __init__(self, facts: CacheFacts, comparison: Comparison, sight: int) -> None:
        super().__init__(facts, comparison.learned)
        self._needs_NLE = np.zeros((len(comparison.judged) + sight + 1, *self._shape))
        for number, recorded in enumerate(comparison.judged):
            for place, rows_of in enumerate(recorded.rows_of_L):
                self._needs_NLE[number, place, list(rows_of)] = 1
        self._sight, self._number = sight, -1
        self._known_LE = np.zeros(self._shape)
        for place in range(self._shape[0]):
            self._look(place)

    def begin(self, forward: Forward) -> None:
        super().begin(forward)
        self._number += 1

    def touch(self, key: Key, rows: int) -> None:
        super().touch(key, rows)
        self._look(self._now)

    def scores(self) -> np.ndarray:
        return super().scores() + 10 * self._known_LE

    def _look(self, place: int) -> None:
        following = self._needs_NLE[self._number + 1 : self._number + 1 + self._sight, place]
        weights = 0.5 ** np.arange(self._sight)
        self._known_LE[place] = np.tensordot(weights, following, axes=1)


def compare(path: Path) -> dict[str, list[dict]]:
    """Replay every policy at every budget; print and return the outcomes."""
    file = RouteFile(path)
    comparison = Comparison(file.header, read_forwards([file]), held_out=0.5)
    found, seen = [], []
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
    for sight in (1, 2, 3):
        line = f"sees {sight:<8}"
        for share in SHARES:
            facts = comparison.facts(int(share * comparison.num_experts))
            counters = replay(comparison.judged, facts, Seer(facts, comparison, sight))
            bound = next(o for o in found if o["share"] == share and o["policy"] == "belady")
            gap = counters.misses / bound["misses"]
            rate = counters.hits / (counters.hits + counters.misses)
            line += f"{rate:8.1%} {counters.misses:8} {gap:6.3f}"
            seen.append({"sees": sight, "share": share, "misses": counters.misses, "gap": gap})
        print(line, flush=True)
    for share in SHARES:
        best = min(
            (o for o in found if o["share"] == share and o["policy"] != "belady"),
            key=lambda o: o["gap"],
        )
        says = "reaches" if best["gap"] <= TARGET else "misses"
        print(f"{share:.0%}: best is {best['policy']}, {best['gap']:.3f}: {says} {TARGET}")
    return {"policies": found, "seers": seen}


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
