"""Does an answer depend on what else a server does? Random mixes against each request alone.

    python benchmarks/serving_exact.py [MODEL_DIR] --mixes 500 [--first 500]

Each mix draws requests (prompts that begin alike, ``n`` > 1, greedy and sampled, scored prompts,
priorities, salts), the moments at which they come, and an engine: number type, seats, rows of
prompts in a step, a budget of blocks that is often too small, prefix reuse, experts in memory or a
quarter of them, guesses of next tokens that are often wrong. All requests of a mix also run alone,
in an engine that has never seen another one. Texts, reasons and reported log-probabilities must be
equal, bit for bit, and no gauge may be above zero at the end. Without MODEL_DIR a small random
model answers, whose scores are sharp. The number of a mix is its seed, so a long run may be divided
by ``--first``.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from serving_mixes import alone, counted, gauges, mixed, random_requests

from moeyard.moe.drafts import speculation
from moeyard.moe.drafts.table import DRAFTERS
from moeyard.moe.kv_blocks import bytes_per_block
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.kv_memory import specs_of
from moeyard.serving.loading import open_model

from report import write_results

sys.path.append(str(Path(__file__).parents[1] / "tests" / "serving"))
from drafters import KINDS, Told

from small_model import write_random_model

COUNTERS = ("preemptions", "prefix_cache_hits", "prefix_cache_queries", "generation_tokens")
DRAFT_COUNTERS = ("draft_tokens", "draft_tokens_accepted")
MOST_DRAFTED = 5
"""Guesses of a text that run in a step, whether they would pay or not."""
TOLD = "told"
"""A drafter that knows the answers, and says them or others."""
PROGRESS_EVERY = 50
FIRST_CHARACTER = 0x100


def decode(ids) -> str:
    """One character a token, so that texts show tokens."""
    return "".join(chr(FIRST_CHARACTER + token) for token in ids)


def encode(text: str) -> list[int]:
    """Return the tokens that a text shows."""
    return [ord(character) - FIRST_CHARACTER for character in text]


class Mixes:
    """Runs mixes over a model in every way that it is opened, and counts what they met."""

    def __init__(self, folder: Path) -> None:
        self._models = {
            (dtype, memory): open_model(folder, dtype, expert_memory=memory)
            for dtype in ("bf16", "fp32")
            for memory in (None, "25%")
        }
        self.counts: Counter[str] = Counter()
        self.different: list[dict] = []

    def run(self, seed: int) -> None:
        """Run one mix, and each of its requests alone."""
        chance = random.Random(seed)
        (dtype, memory), (model, store) = chance.choice(list(self._models.items()))
        chunk = chance.choice([8, 16, 32, 48, 256])
        # Long prompts that share beginnings, or long answers that outgrow a small budget.
        lengths = chance.choice([{"longest": 90, "most_tokens": 10}, {"longest": 24}])
        requests = random_requests(
            chance,
            chance.randint(3, 6),
            **{"most_tokens": 48, "texts": chance.randint(1, 3)} | lengths,
        )
        longest = max(len(one.prompt_ids) + one.max_tokens for one in requests)
        least = -(-longest // 16)
        block = bytes_per_block(specs_of(model.decoder))
        options = {
            "max_num_seqs": chance.randint(1, 8),
            "prefill_chunk": chunk,
            "kv_memory": f"{block * chance.choice([least, least + 3, 2 * least, 1000])}B",
            "reuses_prefixes": chance.random() < 0.8,
        }
        expected = {
            one.request_id: alone(lambda: Engine(model, decode, store, prefill_chunk=chunk), one)
            for one in requests
        }
        options["speculative"] = chance.choice(["none", "ngram", "suffix", TOLD])
        told = {one.prompt_ids: encode(expected[one.request_id][0]) for one in requests}
        kind = chance.choice(KINDS)
        DRAFTERS[TOLD] = lambda: Told(kind, told, seed)
        engine = Engine(model, decode, store, **options)
        answers = mixed(engine, requests, chance)
        for one in requests:
            if answers.of(one.request_id) != expected[one.request_id]:
                case = {"seed": seed, "request": one.request_id, "dtype": dtype, "memory": memory}
                self.different.append({**case, **options})
        names = COUNTERS if options["speculative"] == "none" else COUNTERS + DRAFT_COUNTERS
        self.counts.update({name: int(counted(engine, name)) for name in names})
        self.counts.update(mixes=1, requests=len(requests), **{f"mixes_{dtype}": 1})
        self.counts["mixes_offloaded"] += memory is not None
        self.counts["mixes_with_guesses"] += options["speculative"] != "none"
        self.counts["gauges_not_zero"] += any(gauges(engine).values())


def guess_always() -> None:
    """Have texts run some of their guesses, whatever that costs."""
    counts = random.Random(3)

    def share_rows(chances, num_texts, costs, most_rows):
        return [min(len(own), counts.randint(0, MOST_DRAFTED)) for own in chances]

    speculation.share_rows = share_rows


def random_model(folder: Path) -> Path:
    """Write the small model of the tests, which has sharp scores."""
    write_random_model(folder)
    return folder


def main() -> None:
    """Run mixes until there are enough or time is over, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--mixes", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first mix")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    asked = parser.parse_args()
    guess_always()
    with tempfile.TemporaryDirectory() as folder:
        mixes = Mixes(asked.model or random_model(Path(folder) / "small"))
        started = time.monotonic()
        for done, seed in enumerate(range(asked.first, asked.first + asked.mixes)):
            seconds = time.monotonic() - started
            if seconds > asked.seconds:
                break
            if done > 0 and done % PROGRESS_EVERY == 0:
                found = f"{done} mixes in {seconds:.0f} s, {len(mixes.different)} answers differ"
                print(found, flush=True)
            mixes.run(seed)
    different = len(mixes.different)
    figures = {
        "question": "does an answer depend on the batch, chunks, preemption, reuse or guesses",
        "model": asked.model.name if asked.model else "the small random model of the tests",
        "asked_mixes": asked.mixes,
        "first_mix": asked.first,
        **mixes.counts,
        "different_answers": different,
        "first_different": mixes.different[:10],
    }
    print(f"{different} of {mixes.counts['requests']} answers differ: {dict(mixes.counts)}")
    parts = ["serving_exact", asked.model and asked.model.name, asked.first and str(asked.first)]
    name = "_".join(filter(None, parts))
    print(f"written to {write_results(name, figures)}")
    sys.exit(1 if different or mixes.counts["gauges_not_zero"] else 0)


if __name__ == "__main__":
    main()
