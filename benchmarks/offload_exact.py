"""Are offloaded outputs bit for bit the resident ones, and does a request ever depend on others?

    python benchmarks/offload_exact.py MODEL_DIR

For float32 and bfloat16 and budgets of 100 %, 50 %, 25 % and one slot: logits of a prompt batch and
of 64 decoding steps against the fully resident model, with hits, misses and bytes read. Then, in
bfloat16, greedy answers of an engine to eight prompts one by one and all together.
"""

import argparse
from pathlib import Path

import torch

from moeyard.moe.batch import batch_of
from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.loading import open_model

from report import write_results

PROMPTS = [
    "import os\n",
    "def main(",
    "class Node:\n    def __init__(self",
    '"""',
    "for i in range(",
]
PROMPTS += ["    raise ValueError(", "# Copyright", "x" * 700]


@torch.inference_mode()
def logits_of(model, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Return logits of whole rows, then of each of 64 greedy steps that continue the first row."""
    logits = [model(ids_BT)]
    decoder, cache, new = model.decoder, model.decoder.new_cache(), ids_BT[0]
    for _ in range(64):
        logits.append(decoder.logits(decoder(batch_of([new], [cache])).hidden_TD[-1:]))
        new = logits[-1].argmax(-1)
    return logits


def compare_budgets(folder: Path) -> list[dict]:
    table = []
    ids = torch.randint(0, 256, (4, 96), generator=torch.Generator().manual_seed(0))
    for dtype in ("float32", "bfloat16"):
        resident = logits_of(open_model(folder, dtype)[0], ids)
        for budget in ("100%", "50%", "25%", "one slot"):
            memory = budget
            if budget == "one slot":
                memory = f"{open_model(folder, dtype, expert_memory='100%')[1].slot_bytes}B"
            model, store = open_model(folder, dtype, expert_memory=memory)
            offloaded = logits_of(model, ids)
            traffic = store.statistics.layers.values()
            table.append(
                {
                    "dtype": dtype,
                    "budget": budget,
                    "slots": store.num_slots,
                    "bits_equal": all(
                        torch.equal(a, b) for a, b in zip(resident, offloaded, strict=True)
                    ),
                    "hits": sum(t.hits for t in traffic),
                    "misses": sum(t.misses for t in traffic),
                    "megabytes_read": sum(t.bytes_read for t in traffic) / 1e6,
                    "stall_s": round(sum(t.stall_s for t in traffic), 4),
                }
            )
            print("  ".join(f"{k} {v}" for k, v in table[-1].items()), flush=True)
    return table


def answers(folder: Path, at_once: bool) -> dict[str, list[str]]:
    """Return the greedy answers of one bfloat16 engine with a quarter of the experts in memory."""
    model, store = open_model(folder, "bfloat16", expert_memory="25%")
    engine = Engine(model, lambda ids: "".join(chr(256 + i) for i in ids), store, max_num_seqs=8)
    found: dict[str, list[str]] = {}
    for number, prompt in enumerate(PROMPTS):
        greedy = SamplingParams(temperature=0)
        request = GenerationRequest(str(number), tuple(prompt.encode()), 64, greedy)
        engine.add(request)
        while engine.has_work and not at_once:
            collect(engine, found)
    while engine.has_work:
        collect(engine, found)
    return found


def collect(engine: Engine, found: dict[str, list[str]]) -> None:
    for event in engine.step():
        found.setdefault(event.request_id, []).append(event.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    table = compare_budgets(folder)
    alone, together = answers(folder, at_once=False), answers(folder, at_once=True)
    same = sum("".join(alone[k]) == "".join(together[k]) for k in alone)
    print(f"bfloat16 greedy answers equal alone and among others: {same} of {len(PROMPTS)}")
    path = write_results(
        "offload_exact",
        {
            "question": "are logits at every expert budget the resident ones bit for bit",
            "budgets": table,
            "bfloat16_answers_equal_alone_and_among_others": [same, len(PROMPTS)],
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
