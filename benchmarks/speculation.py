"""What speculation gains and costs: tokens per second with each drafter and without.

    python benchmarks/speculation.py MODEL TEXT [--rounds 5] [--tokens 96] [--threads 2]

MODEL has byte tokens, TEXT is held-out text. One and eight requests decode in the engine, and no
event goes further. Two kinds of text: `copied` is a JSON record, three times over, whose copy
the greedy answer goes on with; `prose` is TEXT, and answers are drawn at temperature 1, so
little is said twice. `forced` are answers of `prose` drafted by a program that knows them and is
right with the chance in its name: the gain by acceptance, whatever the model can say.

Each arm has an engine, which knows its costs from the round before the first that counts. Arms take
turns step by step, so that other programs slow all of them; prompts are not timed. Figures are
medians of the rounds, gains are medians of the rounds' ratios. The answers of all arms must be
equal, or the program fails. With ``--clock cpu`` and one thread, times are the process's CPU time.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from moeyard.moe.drafts.drafter import Draft
from moeyard.moe.drafts.table import DRAFTERS
from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.loading import open_model

from report import write_results

Clock = Callable[[], float]
GREEDY, DRAWN = SamplingParams(temperature=0), SamplingParams(temperature=1.0)
CHANCES = (0.9, 0.7, 0.5)
PROMPT = 128
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
    """Return a JSON list that holds a record three times, and then begins it again."""
    draw = random.Random(seed)
    row = {name: draw.randrange(10, 99) for name in ("id", "name", "price", "count")}
    text = json.dumps(row)
    return "[" + (text + ",\n") * 3 + text[:8]


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


class Arm:
    """An engine, and what its requests have said in a round."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.texts: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._before = 0
        self._seconds = 0.0

    def begin(self, asked: list[GenerationRequest]) -> None:
        """Take the requests of a round and read their prompts, which is not timed."""
        self.texts = {one.request_id: "" for one in asked}
        self._counts = dict.fromkeys(self.texts, 0)
        for one in asked:
            self.engine.add(one)
        while not min(self._counts.values()):
            self._step()
        self._before, self._seconds = sum(self._counts.values()), 0.0

    def step(self, clock: Clock) -> bool:
        """Take one step, if a request is left; say whether one was."""
        if not self.engine.has_work:
            return False
        started = clock()
        self._step()
        self._seconds += clock() - started
        return True

    def _step(self) -> None:
        for event in self.engine.step():
            self.texts[event.request_id] += event.text
            self._counts[event.request_id] = event.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Of the round's steps."""
        return (sum(self._counts.values()) - self._before) / self._seconds


def compare(model, text: bytes, kind: str, count: int, given: argparse.Namespace) -> list[dict]:
    """Measure all arms of a case in turns and return a row for each."""
    asked = requests("copied" if kind == "copied" else "prose", text, count, given.tokens)
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    if kind == "forced":
        plain = Arm(Engine(model, spelled, max_num_seqs=count))
        plain.begin(asked)
        while plain.step(clock):
            pass
        said = plain.texts
        Told.answers = {one.prompt_ids: list(map(ord, said[one.request_id])) for one in asked}
    names = ("none", *DRAFTERS)
    engines = (Engine(model, spelled, max_num_seqs=count, speculative=name) for name in names)
    arms = dict(zip(names, map(Arm, engines), strict=True))
    rates: dict[str, list[float]] = {name: [] for name in names}
    for arm in arms.values():
        if arm.engine._speculation is not None:
            arm.engine._speculation._clock = clock
    for turn in range(given.rounds + 1):
        for arm in arms.values():
            arm.begin(asked)
        while sum(arm.step(clock) for arm in arms.values()):  # not any(): every arm takes a step
            pass
        assert all(arm.texts == arms["none"].texts for arm in arms.values()), "an answer changed"
        for name, arm in arms.items() if turn else ():
            rates[name].append(arm.tokens_per_s)
    return [
        {
            "case": kind,
            "requests": count,
            "arm": name,
            "tokens_per_s": statistics.median(rates[name]),
            "gains": [a / b for a, b in zip(rates[name], rates["none"], strict=True)],
            **counts_of(arm.engine),
        }
        for name, arm in arms.items()
    ]


def spelled(ids: list[int]) -> str:
    """Return one character for each id."""
    return "".join(map(chr, ids))


def told_name(chance: float) -> str:
    return f"right {chance:.0%}"


def counts_of(engine: Engine) -> dict[str, float]:
    """Return the shares of drafted tokens in the generated ones, and of those the accepted ones."""
    read = engine.metrics.registry.get_sample_value
    generated = read("moeyard_generation_tokens_total")
    drafted = read("moeyard_draft_tokens_total") or 0.0
    accepted = read("moeyard_draft_tokens_accepted_total") or 0.0
    return {
        "drafted_per_token": drafted / generated,
        "accepted_per_drafted": accepted / max(1.0, drafted),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--cases", nargs="+", default=["copied", "prose", "forced"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--name", default="speculation")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, _ = open_model(given.model)
    text = given.text.read_bytes()
    rows = []
    print(f"{'case':8} requests {'drafter':10} tokens/s   gain  drafted/token  accepted/drafted")
    for kind in given.cases:
        if kind == "forced":
            DRAFTERS.clear()
            DRAFTERS.update({told_name(c): lambda c=c: Told(c) for c in CHANCES})
        for count in given.batches:
            for row in compare(model, text, kind, count, given):
                rows.append(row)
                print(
                    f"{row['case']:8} {row['requests']:8} {row['arm']:10} "
                    f"{row['tokens_per_s']:8.1f} {statistics.median(row['gains']):5.2f}x "
                    f"{row['drafted_per_token']:14.2f} {row['accepted_per_drafted']:17.2f}",
                    flush=True,
                )
    figures = {
        "model": given.model.name,
        "clock": given.clock,
        "threads": given.threads,
        "rows": rows,
    }
    print("written to", write_results(given.name, figures))


if __name__ == "__main__":
    main()
