"""Every policy on the same recorded forwards, next to the bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....errors import ConfigError
from ....moe.routes.format import RouteHeader
from ..policies.belady import Belady
from ..policies.policy import CacheFacts, Policy
from ..policies.table import BOUND, LEARNING, POLICIES, open_policy
from ..predictors.predictor import Predictor, PredictorFacts
from ..predictors.table import predictor_of_routes
from ..recorded import RecordedForward
from .run import Counters, Hints, Pace, all_keys, replay

ON_DEMAND = "none"
EXACT = "next_layer"
"""Knows what the next layer will need, as if its router chose a layer earlier."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a replay is asked for."""

    policy: str
    predictor: str
    num_slots: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a setting came to."""

    setting: Setting
    counters: Counters
    bound: int
    """Misses of Belady's rule with as many slots, reading on demand."""

    @property
    def gap(self) -> float:
        """Experts that compute waited for, over the misses of Belady's rule."""
        return self.counters.waits / max(1, self.bound)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "policy": self.setting.policy,
            "predictor": self.setting.predictor,
            "slots": self.setting.num_slots,
            **self.counters.as_dict(),
            "gap": round(self.gap, 4),
        }


class Comparison:
    """Recorded forwards: the first part to learn from, the other one to be judged by.

    ``held_out`` is the share of the second part. Every replay begins with an empty store at the
    second part, so all settings, and the bound, are compared on the same needs.
    """

    def __init__(
        self, header: RouteHeader, forwards: Sequence[RecordedForward], held_out: float
    ) -> None:
        if not 0 < held_out <= 1:
            raise ConfigError(f"held-out is {held_out:g}; use a share above 0 and up to 1.")
        first = round(len(forwards) * (1 - held_out))
        self.header = header
        self.learned, self.judged = forwards[:first], forwards[first:]
        if not self.judged:
            raise ConfigError(
                f"held-out is {held_out:g}, and of {len(forwards)} forwards none is left to judge "
                "by; use a larger share."
            )
        self._bounds: dict[int, Counters] = {}

    @property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return len(self.header.moe_layers) * self.header.num_experts

    def policies(self, names: Sequence[str]) -> list[str]:
        """Return the policies that ``names`` ask for; ``all`` are those that can be used here."""
        found: list[str] = []
        for name in names:
            if name == "all":
                found += [*POLICIES, *(LEARNING if self.learned else ()), BOUND]
            else:
                self._check(name)
                found.append(name)
        return list(dict.fromkeys(found))

    def run(self, setting: Setting, slot_bytes: int, pace: Pace | None) -> Outcome:
        """Replay the second part."""
        facts = self.facts(setting.num_slots)
        bound = self._bound(facts)
        hints: Hints | None = None
        if setting.predictor == EXACT:
            hints = partial(_next_layer, self.judged, self.header.moe_layers)
        predictor = None
        if setting.predictor not in (ON_DEMAND, EXACT):
            predictor = self._predictor(setting.predictor, facts)
        policy = self._open(setting.policy, facts)
        counters = replay(self.judged, facts, policy, slot_bytes, pace, hints, predictor)
        return Outcome(setting, counters, bound.misses)

    def check_predictor(self, name: str) -> None:
        """Raise :class:`ConfigError` for a predictor that recorded routes do not suffice for."""
        if name not in (ON_DEMAND, EXACT):
            predictor_of_routes(name, self.facts(1), self.header.k)

    def _predictor(self, name: str, facts: CacheFacts) -> tuple[Predictor, PredictorFacts]:
        """Return a predictor that has seen the first part."""
        own = PredictorFacts(facts.moe_layers, facts.num_experts, self.header.k, facts.architecture)
        predictor = predictor_of_routes(name, facts, self.header.k)
        for recorded in self.learned:
            predictor.begin(recorded.forward)
            for place, layer in enumerate(facts.moe_layers):
                predictor.see(layer, recorded.experts_NLK[:, place])
        return predictor, own

    def facts(self, num_slots: int) -> CacheFacts:
        """Return what policies for so many slots are built from."""
        header = self.header
        architecture = header.model.architecture
        return CacheFacts(header.moe_layers, header.num_experts, num_slots, architecture)

    def _bound(self, facts: CacheFacts) -> Counters:
        if facts.num_slots not in self._bounds:
            policy = Belady(all_keys(self.judged, facts))
            self._bounds[facts.num_slots] = replay(self.judged, facts, policy)
        return self._bounds[facts.num_slots]

    def _check(self, name: str) -> None:
        if name in LEARNING and not self.learned:
            raise ConfigError(
                f"{name} learns from the part of the routes that is not held out, and held-out is "
                "1; use a smaller share, or leave it out."
            )
        if name != BOUND and name not in LEARNING:
            open_policy(name, self.facts(1))

    def _open(self, name: str, facts: CacheFacts) -> Policy:
        if name == BOUND:
            return Belady(all_keys(self.judged, facts))
        if name in LEARNING:
            return LEARNING[name](facts, self.learned)
        return open_policy(name, facts)


def _next_layer(
    forwards: Sequence[RecordedForward], moe_layers: Sequence[int], number: int, place: int
) -> list[tuple[int, list[int]]]:
    if place + 1 == len(moe_layers):
        return []
    return [(moe_layers[place + 1], list(forwards[number].rows_of_L[place + 1]))]
