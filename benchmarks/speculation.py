"""What speculation gains and costs: tokens per second with each drafter and without.

    python benchmarks/speculation.py MODEL TEXT [--rounds 5] [--tokens 160] [--threads 2] [--name X]

MODEL has byte tokens, TEXT is held-out text. One and eight requests decode in the engine, and no
event goes further. Two kinds of text: `copied` is a list of JSON records, three times over, whose
copy the greedy answer goes on with; `prose` is TEXT, and answers are drawn at temperature 1, so
little is said twice. `forced` are answers of `prose` drafted by a program that knows them and is
right with the chance in its name: the gain by acceptance, whatever the model can say.

Arms take turns in one process; the figures are medians of the rounds, and gains are medians of the
rounds' ratios. The answers of all arms must be equal, or the program fails. Wall clock.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.engine.drafts.drafter import Draft
from moeyard.serving.engine.drafts.table import DRAFTERS
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.loading import open_model

from report import write_results

GREEDY, DRAWN = SamplingParams(temperature=0), SamplingParams(temperature=1.0)
BATCHES = (1, 8)
CHANCES = (0.9, 0.7, 0.5)
PROMPT = 256
"""Bytes of a prompt of prose."""


class Told:
    """Knows the answers, and is right with a fixed chance."""

    answers: dict[tuple[int, ...], list[int]] = {}

    def __init__(self, chance: float) -> None:
        self._chance, self._random = chance, random.Random(0)
        self._ids: list[int] = []
        self._coming: list[int] | None = None

    def add(self, ids: Iterable[int]) -> None:
        """See Drafter."""
        self._ids += ids

    def draft(self, count: int) -> Draft:
        """Return the true ids up to the first that chance makes wrong."""
        if self._coming is None:
            self._coming = next(
                [*prompt, *answer]
                for prompt, answer in self.answers.items()
                if tuple(self._ids[: len(prompt)]) == prompt
            )
        coming = self._coming[len(self._ids) :][:count]
        chosen = (t if self._random.random() < self._chance else (t + 1) % 256 for t in coming)
        return Draft(tuple(chosen), 1)


def records(seed: int) -> str:
    """Return a JSON list that holds the same records three times, and then begins again."""
    draw = random.Random(seed)
    names = ("id", "name", "price", "count", "city", "tags")
    rows = [{name: draw.randrange(10, 99) for name in names} for _ in range(2)]
    text = ",\n".join(json.dumps(row) for row in rows)
    return "[" + (text + ",\n") * 3 + text[:20]


def requests(kind: str, text: bytes, count: int, tokens: int) -> list[GenerationRequest]:
    """Return the requests of a case; all end after ``tokens``."""
    found = []
    for index in range(count):
        ids: tuple[int, ...]
        if kind == "copied":
            ids, sampling = tuple(records(index).encode()), GREEDY
        else:
            start = index * (len(text) // count)
            ids, sampling = tuple(text[start : start + PROMPT]), DRAWN
        options = {"seed": index, "ignore_eos": True}
        found.append(GenerationRequest(str(index), ids, tokens, sampling, **options))
    return found


def run(engine: Engine, asked: list[GenerationRequest]) -> tuple[float, dict[str, str]]:
    """Return tokens per second after the prompts are read, and the texts."""
    for one in asked:
        engine.add(one)
    texts = {one.request_id: "" for one in asked}
    counts = dict.fromkeys(texts, 0)
    started, before = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.text
            counts[event.request_id] = event.num_tokens
        if not started and min(counts.values()):
            started, before = time.perf_counter(), sum(counts.values())
    return (sum(counts.values()) - before) / (time.perf_counter() - started), texts


def compare(model, text: bytes, kind: str, count: int, given: argparse.Namespace) -> list[dict]:
    """Measure all arms of a case in turns and return a row for each."""
    asked = requests("copied" if kind == "copied" else "prose", text, count, given.tokens)
    arms = ["none", *DRAFTERS] if kind != "forced" else ["none", *map(told_name, CHANCES)]
    if kind == "forced":
        _, texts = run(Engine(model, spelled, max_num_seqs=count), asked)
        answers = {one.prompt_ids: list(map(ord, texts[one.request_id])) for one in asked}
        Told.answers = answers
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    counted: dict[str, tuple[float, float]] = {}
    for _ in range(given.rounds):
        said = {}
        for arm in arms:
            engine = Engine(model, spelled, max_num_seqs=count, speculative=arm)
            rate, said[arm] = run(engine, asked)
            rates[arm].append(rate)
            counted[arm] = counts_of(engine)
        assert all(texts == said["none"] for texts in said.values()), "an answer changed"
    base = rates["none"]
    return [
        {
            "case": kind,
            "requests": count,
            "arm": arm,
            "tokens_per_s": statistics.median(rates[arm]),
            "gain": statistics.median(a / b for a, b in zip(rates[arm], base, strict=True)),
            "gains": [a / b for a, b in zip(rates[arm], base, strict=True)],
            "drafted": counted[arm][0],
            "accepted": counted[arm][1],
        }
        for arm in arms
    ]


def spelled(ids: list[int]) -> str:
    """Return one character for each id."""
    return "".join(map(chr, ids))


def told_name(chance: float) -> str:
    return f"right {chance:.0%}"


def counts_of(engine: Engine) -> tuple[float, float]:
    """Return drafted and accepted tokens."""
    read = engine.metrics.registry.get_sample_value
    names = ("moeyard_draft_tokens_total", "moeyard_draft_tokens_accepted_total")
    drafted, accepted = (read(name) or 0.0 for name in names)
    return drafted, accepted


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["copied", "prose", "forced"])
    parser.add_argument("--name", default="speculation")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, _ = open_model(given.model)
    text = given.text.read_bytes()
    own = list(DRAFTERS)
    rows = []
    print(f"{'case':8} requests {'arm':10} tokens/s   gain  drafted accepted")
    for kind in given.cases:
        if kind == "forced":
            DRAFTERS.clear()
            DRAFTERS.update({told_name(c): lambda c=c: Told(c) for c in CHANCES})
        for count in BATCHES:
            for row in compare(model, text, kind, count, given):
                rows.append(row)
                print(
                    f"{row['case']:8} {row['requests']:8} {row['arm']:10} "
                    f"{row['tokens_per_s']:8.1f} {row['gain']:5.2f}x "
                    f"{row['drafted']:8.0f} {row['accepted']:8.0f}",
                    flush=True,
                )
    figures = {"model": given.model.name, "drafters": own, "threads": given.threads, "rows": rows}
    print("written to", write_results(given.name, figures))


if __name__ == "__main__":
    main()
