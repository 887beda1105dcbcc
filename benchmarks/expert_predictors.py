"""How much do predictors of experts say, and what do they cost?

    python benchmarks/expert_predictors.py MODEL_DIR TEXT...

The model generates from held-out texts, and its routes are recorded. Predictors learn from the
first half of the texts and are judged on the other half, token by token, by distance in layers and
by how many experts count. Next to it the time a predictor takes for each layer. The part
``trained`` of offloading.py says what they are worth end to end.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

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
from moeyard.serving.experts.predictors.table import LEARNING, facts_of
from moeyard.serving.experts.predictors.trained import Trained, save
from moeyard.serving.loading import open_model

from report import write_results

PROMPT, ANSWER, TEXTS = 150, 200, 40
"""Tokens of a prompt, tokens of an answer, and texts whose routes are recorded."""
JUDGED_ROWS = 1500


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
            named_NSE = gates.best(layer, x_ND, facts.num_experts)
            for number, best_NE in enumerate(named_NSE.swapaxes(0, 1)):
                true_NK = inputs[facts.moe_layers[place + 1 + number]][1].numpy()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="where the trained network is written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = [path.read_text(encoding="utf-8") for path in arguments.texts]
    model, _ = open_model(arguments.model)
    facts = facts_of(model.config)
    found, arrays = recalls(model, record(model, texts), facts)
    if arguments.save is not None:
        save(arguments.save, facts, arrays)
    path = write_results("expert_predictors", {"recalls": found})
    sys.stdout.write(f"written to {path}\n")


if __name__ == "__main__":
    main()
