"""Drafters for tests, and engines that run all they guess."""

import random

from moeyard.moe.drafts import speculation
from moeyard.moe.drafts.drafter import Draft
from moeyard.moe.drafts.table import DRAFTERS

KINDS = ("right", "wrong", "mixed")


class Told:
    """Knows the answers, and says what comes next, something else, or now this and now that."""

    def __init__(self, kind: str, answers: dict[tuple, list], seed: int) -> None:
        self._kind = kind
        self._answers = answers
        self._random = random.Random(seed)
        self._ids: tuple = ()

    def add(self, ids) -> None:
        self._ids += tuple(ids)

    def draft(self, count: int) -> Draft:
        for prompt, answer in self._answers.items():
            known = (*prompt, *answer)
            if len(self._ids) >= len(prompt) and known[: len(self._ids)] == self._ids:
                coming = known[len(self._ids) :][:count]
                break
        else:
            return Draft(())
        if self._kind == "right":
            return Draft(coming)
        if self._kind == "wrong":
            changed = (token + 1 + 37 * place for place, token in enumerate(coming))
            return Draft(tuple(token % 256 for token in changed))
        chosen = (token if self._random.random() < 0.7 else 7 for token in coming)
        return Draft(tuple(chosen))


def use_told(monkeypatch, kind: str, answers: dict[tuple, list], most_each: int = 5) -> None:
    """Make the drafter ``told`` known, and let texts run up to ``most_each`` of its ids a step."""
    counts = random.Random(3)
    seeds = iter(range(1000))
    monkeypatch.setitem(DRAFTERS, "told", lambda: Told(kind, answers, next(seeds)))

    def share_rows(chances, num_texts, costs, most_rows):
        return [min(len(own), counts.randint(0, most_each)) for own in chances]

    monkeypatch.setattr(speculation, "share_rows", share_rows)


def draft_counts(engine) -> tuple[int, int]:
    """Return how many drafted rows an engine ran, and how many were right."""
    read = engine.metrics.registry.get_sample_value
    names = ("moeyard_draft_tokens_total", "moeyard_draft_tokens_accepted_total")
    drafted, accepted = (read(name) for name in names)
    return int(drafted), int(accepted)
