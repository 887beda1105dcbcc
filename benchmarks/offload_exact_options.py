"""Do policies, predictors, readers, budgets and other sequences change a bit of the logits?

    python benchmarks/offload_exact_options.py MODEL_DIR TEXT_FILE [--steps 12]

Every combination of a policy, a predictor, a way to read and a budget runs the same forwards as the
model in memory: prompts together, a prompt that arrives while others decode, decoding together, and
one sequence alone. Policies and predictors that learn from a file get routes of the text, fitted
routers the text itself. ``--always`` takes away the switch that turns reading ahead off.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch

from moeyard.moe.batch import batch_of
from moeyard.moe.models.language_model import LanguageModel
from moeyard.moe.routes.recorder import recording
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.predictors.fit_gates import fit_gates, pieces
from moeyard.serving.experts.predictors.fitted_gates import save as save_gates
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.predictors.table import facts_of
from moeyard.serving.loading import open_model

from report import write_results

POLICIES = ("lru", "lfu", "decayed_lfu", "edgemoe", "activations", "working_set",
            "hot_set:{routes}", "future_use:{routes}")  # fmt: skip
PREDICTORS = ("none", "auto", "next_gates", "fitted_gates:{gates}", "previous_layers",
              "activations:{routes}", "previous_token")  # fmt: skip
READERS = ("auto", "buffered", "direct")
BUDGETS = ("10%", "25%", "50%", "75%", "100%")
LENGTHS = (40, 17, 29)
"""Of the prompts."""


@torch.inference_mode()
def logits_of(model: LanguageModel, ids_N: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Return the logits of every forward."""
    decoder, found = model.decoder, []
    prompts = list(ids_N[: sum(LENGTHS)].split(LENGTHS))
    caches = [decoder.new_cache() for _ in prompts]

    def run(numbers: list[int], rows: list[torch.Tensor]) -> torch.Tensor:
        batch = batch_of(rows, [caches[number] for number in numbers])
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        found.append(decoder.logits(decoder(batch).hidden_TD[ends]))
        return found[-1].argmax(-1)

    new = run([0, 1], prompts[:2])
    new = run([0, 1, 2], [new[:1], new[1:], prompts[2]])
    for _ in range(steps):
        new = run([0, 1, 2], list(new.split(1)))
    for _ in range(steps):
        new = run([1], [new[-1:]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--predictors", nargs="+", choices=PREDICTORS, default=PREDICTORS)
    parser.add_argument("--always", action="store_true", help="read ahead in every forward")
    arguments = parser.parse_args()
    resident, _ = open_model(arguments.model)
    text = arguments.text.read_text()
    ids_N = torch.tensor(resident.tokenizer(text[:2000])["input_ids"])
    expected = logits_of(resident, ids_N, arguments.steps)
    different, counted, started = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("routes", "gates")}
        facts = facts_of(resident.config)
        maps = fit_gates(facts, resident.decoder, pieces(ids_N.tolist(), len(ids_N)))
        save_gates(Path(files["gates"]), facts, maps)
        with recording(resident.decoder, Path(files["routes"]), written_by="offload_exact"):
            resident.generate(text[2000:2100], max_new_tokens=50, seed=0)
        for policy, predictor in itertools.product(POLICIES, arguments.predictors):
            for reader, budget in itertools.product(READERS, BUDGETS):
                options = StoreOptions(
                    policy=policy.format(**files),
                    predictor=predictor.format(**files),
                    reader=reader,
                )
                model, store = open_model(arguments.model, expert_memory=budget, options=options)
                if arguments.always and store._ahead is not None:
                    store._ahead._switch = AlwaysOn()
                found = logits_of(model, ids_N, arguments.steps)
                if not all(map(torch.equal, found, expected)):
                    different.append([policy, predictor, reader, budget])
                    print(f"different: {different[-1]}", flush=True)
                counted += 1
                store.close()
            print(f"{policy} {predictor}: {len(different)} of {counted} differ", flush=True)
    seconds = time.monotonic() - started
    print(f"{counted - len(different)} of {counted} combinations equal the model in memory bit for "
          f"bit, {len(expected)} forwards each, {seconds:.0f} s")  # fmt: skip
    write_results(
        "offload_exact_options",
        {
            "question": "does any combination of options change a bit of the logits",
            "combinations": counted,
            "forwards_each": len(expected),
            "different": different,
        },
    )


if __name__ == "__main__":
    main()
