"""How much do predictors of experts say, what do they cost, and what is it worth?

    python benchmarks/expert_predictors.py MODEL_DIR TEXT... [--timed MODEL_DIR] [--budget 25%]

1. Recall: the model generates from held-out texts, and its routes are recorded. Predictors learn
   from the first half of the texts and are judged on the other half, token by token, by distance in
   layers and by how many experts count. Next to it the time a predictor takes for each layer.
2. End to end: decoding with a part of the experts in memory, on demand and with each predictor in
   turns. The disk is limited by a cgroup (needs root), and pages are dropped after each read, so
   that every read is one of the disk. The limit makes reading as long as computing. The bound is
   what perfect overlap would give: (C + M) / max(C, M).
3. The switch where reading ahead cannot pay: a disk that is five times slower, and one that is not
   limited, where all reads are quick.

Tokens must be the same in all of them.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from oracle_predictor import Oracle

from moeyard.moe.batch import batch_of
from moeyard.moe.models.language_model import LanguageModel
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.moe.routes.rows import Routes
from moeyard.serving.experts.predictors.fit import fit
from moeyard.serving.experts.predictors.next_gates import NextGates
from moeyard.serving.experts.predictors.predictor import Predictor, PredictorFacts
from moeyard.serving.experts.predictors.previous_token import PreviousToken
from moeyard.serving.experts.predictors.recall import Recall, judge, split, widths_of
from moeyard.serving.experts.predictors.replay import learn
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.predictors.table import LEARNING, facts_of
from moeyard.serving.experts.predictors.trained import Trained
from moeyard.serving.experts.store import ExpertStore
from moeyard.serving.loading import open_model

from report import write_results

PROMPT, ANSWER, TEXTS = 150, 200, 40
"""Tokens of a prompt, tokens of an answer, and texts whose routes are recorded."""
JUDGED_ROWS = 1500
TIMED_PROMPTS, TIMED_TOKENS = 2, 100
GROUP = Path("/sys/fs/cgroup/blkio/moeyard-predictors")
ORACLES = (0.5, 0.8, 1.0)


class Disk:
    """Lets every read of this process be one of the disk, at a rate that a cgroup limits."""

    def __init__(self, folder: Path) -> None:
        device = folder.stat().st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        GROUP.mkdir(exist_ok=True)
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        real = os.preadv

        def from_disk(descriptor: int, buffers: list, offset: int) -> int:
            count = real(descriptor, buffers, offset)
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            return count

        os.preadv = from_disk  # type: ignore[assignment]

    def limit(self, bytes_per_s: float | None) -> None:
        """Limit reads from now on; None = do not."""
        number = 0 if bytes_per_s is None else int(bytes_per_s)
        (GROUP / "blkio.throttle.read_bps_device").write_text(f"{self._device} {number}")

    def close(self) -> None:
        """Leave the group."""
        (GROUP.parent / "cgroup.procs").write_text(str(os.getpid()))
        GROUP.rmdir()


def record(model: LanguageModel, texts: list[str]) -> Routes:
    """Return the routes of answers to held-out texts."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "texts.routes"
        with recording(model.decoder, file):
            for number in range(TEXTS):
                text = texts[number % len(texts)]
                start = number // len(texts) * 3000 % (len(text) - PROMPT)
                prompt = text[start : start + PROMPT]
                arguments = {"temperature": 0.8, "seed": number, "ignore_eos": True}
                for _ in model.stream(prompt, max_new_tokens=ANSWER, **arguments):
                    pass
        return RouteFile(file).read()


def us_per_layer(predictor: Predictor, routes: Routes, facts: PredictorFacts) -> float:
    """Return the time of a predictor for a layer of one row, microseconds."""
    started = time.perf_counter()
    judge(predictor, routes, facts, 200)
    return 1e6 * (time.perf_counter() - started) / 200 / len(facts.moe_layers)


@torch.inference_mode()
def judge_gates(model: LanguageModel, routes: Routes, facts: PredictorFacts) -> list[Recall]:
    """Return recalls of the next gates over the recorded texts."""
    gates = NextGates(facts, model.decoder)
    inputs, counts = {}, {}
    handles = [
        layer.experts.register_forward_pre_hook(
            lambda _, arguments, index=index: inputs.update({index: arguments[:2]})
        )
        for index, layer in model.decoder.moe_layers()
    ]
    order = np.lexsort((routes.positions_N, routes.sequences_N))[:JUDGED_ROWS]
    for sequence in np.unique(routes.sequences_N[order]):
        own = order[routes.sequences_N[order] == sequence]
        ids_T = torch.from_numpy(routes.tokens_N[own].astype(np.int64))
        model.decoder(batch_of([ids_T]))
        for place, layer in enumerate(facts.moe_layers[:-1]):
            x_ND, _ = inputs[layer]
            for number, scores_NE in enumerate(gates.scores(layer, x_ND).swapaxes(0, 1)):
                true_NK = inputs[facts.moe_layers[place + 1 + number]][1].numpy()
                best_NE = np.argsort(-scores_NE, axis=1)
                for width in widths_of(facts.k, facts.num_experts, number + 1):
                    is_right = (best_NE[:, :width, None] == true_NK[:, None]).any(axis=1)
                    found = counts.setdefault((number + 1, width), [0, 0, 0])
                    found[0] += true_NK.size
                    found[1] += width * len(true_NK)
                    found[2] += int(is_right.sum())
    for handle in handles:
        handle.remove()
    return [Recall(*key, *found) for key, found in sorted(counts.items())]


def us_of_gates(model: LanguageModel, facts: PredictorFacts) -> float:
    gates, layer = NextGates(facts, model.decoder), facts.moe_layers[0]
    x_1D = torch.randn(1, model.config.d_model)
    for _ in range(50):
        gates.after_choice(layer, x_1D)
    started = time.perf_counter()
    for _ in range(500):
        gates.after_choice(layer, x_1D)
    return 1e6 * (time.perf_counter() - started) / 500


def recalls(model: LanguageModel, routes: Routes, facts: PredictorFacts) -> tuple[dict, dict]:
    """Return the table, and arrays of the trained network."""
    learned, held = split(routes, 0.5)
    started = time.perf_counter()
    arrays = fit(facts, learned)
    print(f"trained on {len(learned)} rows in {time.perf_counter() - started:.0f} s", flush=True)
    predictors: dict[str, Predictor] = {"previous_token": PreviousToken(facts)}
    predictors |= {name: kind(facts) for name, kind in LEARNING.items()}
    for predictor in predictors.values():
        learn(predictor, learned, facts)
    predictors["trained"] = Trained(facts, arrays)
    table = {"next_gates": judge_gates(model, held, facts)}
    times = {"next_gates": us_of_gates(model, facts)}
    for name, predictor in predictors.items():
        times[name] = us_per_layer(predictor, held, facts)
        table[name] = judge(predictor, held, facts, JUDGED_ROWS)
    print(f"{'predictor':16} {'us/layer':>8}   recall (precision) at distance, width")
    for name, found in table.items():
        cells = (f"{r.distance},{r.width}: {r.recall:.3f} ({r.precision:.2f})" for r in found)
        print(f"{name:16} {times[name]:8.0f}   {'  '.join(cells)}", flush=True)
    values = {
        name: {"us_per_layer": times[name], "recalls": [r.as_dict() for r in found]}
        for name, found in table.items()
    }
    return values, arrays


@dataclass
class Arm:
    """A way to read experts."""

    name: str
    model: LanguageModel
    store: ExpertStore


def decode(model: LanguageModel, prompts: list[torch.Tensor]) -> tuple[float, list[list[int]]]:
    """Return seconds of all answers and their tokens."""
    started = time.perf_counter()
    answers = [model.generate(ids, TIMED_TOKENS, temperature=0)[0].tolist() for ids in prompts]
    return time.perf_counter() - started, answers


def open_arms(
    folder: Path, budget: str, arrays: dict, prompts: list[torch.Tensor], switched: bool
) -> list[Arm]:
    """Open the model once for each way; with ``switched`` only those that users have."""

    def opened(name: str) -> Arm:
        return Arm(name, *open_model(folder, expert_memory=budget))

    arms = [opened("on demand")]
    facts = facts_of(arms[0].model.config)
    kinds = {
        "next_gates": lambda arm: NextGates(facts, arm.model.decoder),
        "previous_layers": lambda _: LEARNING["previous_layers"](facts),
        "activations": lambda _: LEARNING["activations"](facts),
        "previous_token": lambda _: PreviousToken(facts),
        "trained": lambda _: Trained(facts, arrays),
    }
    if switched:
        arm = opened("auto")
        arm.store.predict(kinds["next_gates"](arm), facts)
        return [*arms, arm]
    for name, made in kinds.items():
        arm = opened(name)
        arm.store.predict(made(arm), facts, AlwaysOn())
        arms.append(arm)
    routes = routes_of(arms[0].model, prompts)
    for recall in ORACLES:
        arm = opened(f"oracle {recall}")
        arm.store.predict(Oracle(facts, routes, recall), facts, AlwaysOn())
        arms.append(arm)
    return arms


def routes_of(model: LanguageModel, prompts: list[torch.Tensor]) -> Routes:
    """Return the routes of the answers that are timed."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "run.routes"
        with recording(model.decoder, file):
            decode(model, prompts)
        return RouteFile(file).read()


def compare(arms: list[Arm], prompts: list[torch.Tensor], pairs: int, expected: list) -> list[dict]:
    """Measure arms in turns; each ratio is over the first arm's run of the same round."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    rows = []
    before = {}
    for turn in range(pairs + 1):
        for arm in arms if turn % 2 else [arms[0], *arms[:0:-1]]:
            if turn == 1:
                before[arm.name] = totals(arm.store)
            took, answers = decode(arm.model, prompts)
            assert answers == expected, f"{arm.name} gave other tokens than the resident model"
            if turn:  # the first round warms up
                seconds[arm.name].append(took)
    num_tokens = TIMED_TOKENS * len(prompts)
    for arm in arms:
        own = seconds[arm.name]
        ratios = [a / b for a, b in zip(seconds[arms[0].name], own, strict=True)]
        after = totals(arm.store)
        moved = {key: (after[key] - before[arm.name][key]) / pairs for key in after}
        rows.append(
            {
                "arm": arm.name,
                "ms_per_token": 1e3 * statistics.median(own) / num_tokens,
                "of_on_demand": statistics.median(ratios),
                "worst": min(ratios),
                "best": max(ratios),
                **moved,
            }
        )
        row = rows[-1]
        print(
            f"{arm.name:16} {row['ms_per_token']:8.2f} {row['of_on_demand']:9.3f} "
            f"{row['worst']:6.2f}-{row['best']:4.2f} {row['bytes_read'] / 1e6:8.1f} "
            f"{row['stall_s']:7.2f} {row['misses']:7.0f} {row['prefetch_useful']:7.0f} "
            f"{row['prefetch_late']:6.0f} {row['prefetch_wasted']:7.0f}",
            flush=True,
        )
    return rows


HEAD = (
    f"{'arm':16} {'ms/token':>8} {'on demand':>9} {'worst-best':>11} {'MB':>8} {'stall s':>7} "
    f"{'misses':>7} {'useful':>7} {'late':>6} {'wasted':>7}"
)


def totals(store: ExpertStore) -> dict[str, float]:
    names = (
        "misses",
        "prefetch_useful",
        "prefetch_late",
        "prefetch_wasted",
        "bytes_read",
        "stall_s",
    )
    layers = store.statistics.layers.values()
    return {name: sum(getattr(layer, name) for layer in layers) for name in names}


def end_to_end(folder: Path, arrays: dict, texts: list[str], arguments: argparse.Namespace) -> dict:
    resident, _ = open_model(folder)
    prompts = [
        torch.tensor([resident.tokenizer.encode(text[-3 * PROMPT : -2 * PROMPT])])
        for text in texts[:TIMED_PROMPTS]
    ]
    _, expected = decode(resident, prompts)
    compute_s = min(decode(resident, prompts)[0] for _ in range(3))
    disk = Disk(folder)
    found: dict = {"compute_s": compute_s}
    try:
        arms = open_arms(folder, arguments.budget, arrays, prompts, switched=False)
        before = totals(arms[0].store)
        decode(arms[0].model, prompts)
        moved = totals(arms[0].store)["bytes_read"] - before["bytes_read"]
        rate = moved / compute_s / arguments.ratio
        read_s = moved / rate
        bound = (compute_s + read_s) / max(compute_s, read_s)
        found |= {"bytes_read": moved, "rate": rate, "bound": bound}
        print(
            f"\n{arguments.budget} of the experts in memory: C = {compute_s:.2f} s to compute, "
            f"{moved / 1e6:.0f} MB on demand; disk limited to {rate / 1e6:.0f} MB/s: "
            f"M = {read_s:.2f} s; bound (C+M)/max(C,M) = {bound:.2f}\n{HEAD}"
        )
        disk.limit(rate)
        found["arms"] = compare(arms, prompts, arguments.pairs, expected)
        for arm in arms:
            arm.store.close()
        for name, limit in {"the same disk": rate, "a fifth": rate / 5, "no limit": None}.items():
            print(f"\nwith the switch, disk: {name}\n{HEAD}")
            arms = open_arms(folder, arguments.budget, arrays, prompts, switched=True)
            disk.limit(limit)
            pairs = max(2, arguments.pairs // 2) if name == "a fifth" else arguments.pairs
            found[name] = compare(arms, prompts, pairs, expected)
    finally:
        disk.limit(None)
        disk.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--timed", type=Path, help="another model for the second and third part")
    parser.add_argument("--part", choices=("recall", "time"), help="default: both")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=1.0, help="computing over reading")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = [path.read_text(encoding="utf-8") for path in arguments.texts]
    found: dict = {}
    if arguments.part != "time":
        model, _ = open_model(arguments.model)
        facts = facts_of(model.config)
        routes = record(model, texts)
        found["recalls"], arrays = recalls(model, routes, facts)
    if arguments.part != "recall":
        timed = arguments.timed or arguments.model
        if arguments.timed is not None or arguments.part == "time":
            model, _ = open_model(timed)
            arrays = fit(facts_of(model.config), record(model, texts))
        found["end_to_end"] = end_to_end(timed, arrays, texts, arguments)
    path = write_results("expert_predictors", found)
    sys.stdout.write(f"written to {path}; all answers were the resident model's\n")


if __name__ == "__main__":
    main()
