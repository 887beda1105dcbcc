"""The cases of benchmarks/offloading.py: which arms take turns, and under which limits."""

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offloading_arms import Arm, Sizes, accelerate, llama, ours
from offloading_bed import Limits, run

ON_DEMAND = ["policy=lru", "predictor=none", "reader=direct"]
FEW = 3
"""Turns of a case whose arms are far apart."""
RUNTIME = 320 << 20
"""What a process of ours gets next to its weights."""


@dataclass(frozen=True, slots=True)
class Case:
    """Arms that take turns."""

    name: str
    folder: Path
    arms: list[Arm]
    tokens: int
    rate: float
    """Of the disk, in MB/s."""
    turns: int
    is_early: bool = False
    """Its routers choose one layer early."""


class Cases:
    """Builds cases from the command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._a = arguments

    def __iter__(self) -> Iterator[Case]:
        """Yield the cases of the parts that were asked for."""
        for part in self._a.parts:
            yield from getattr(self, part)()

    def trained(self) -> Iterator[Case]:
        """Yield a case for each budget of the trained model."""
        folder = self._model("tiny") if self._a.dry else self._a.trained
        if folder is None:
            print("trained: left out, --trained names no model")
            return
        tokens, rate = self._tokens(96), self._a.trained_rate
        paced = ("--paced", str(rate))
        for number, budget in enumerate(self._a.budgets):
            arms = [ours("on demand", folder, tokens, Limits(), budget, ON_DEMAND, *paced)]
            for predictor in self._a.predictors:
                options = ["policy=lru", f"predictor={predictor}", "reader=direct"]
                arms.append(ours(predictor, folder, tokens, Limits(), budget, options, *paced))
                name, more = f"{predictor}, no switch", ("--always-ahead", *paced)
                arms.append(ours(name, folder, tokens, Limits(), budget, options, *more))
            for recall in self._a.recalls if number == 0 else ():
                name, more = f"oracle {recall}", ("--recall", str(recall), *paced)
                arms.append(ours(name, folder, tokens, Limits(), budget, ON_DEMAND, *more))
            policy = self._a.policy
            if self._a.routes is not None:
                policy = f"future_use:{self._a.routes}"
            options = [f"policy={policy}", "predictor=auto", "reader=direct"]
            arms.append(ours("everything on", folder, tokens, Limits(), budget, options, *paced))
            again = "on demand, again"  # how much equal arms differ by their place in a turn
            arms.append(ours(again, folder, tokens, Limits(), budget, ON_DEMAND, *paced))
            arms.append(ours("resident", folder, tokens, Limits(), None, []))
            name = f"trained, {budget}, {rate:g} MB/s"
            yield Case(name, folder, arms, tokens, rate, self._a.pairs)

    def sweep(self) -> Iterator[Case]:
        """Yield a case for each budget of a random model whose predictor has a set recall."""
        folder, tokens, rate = self._model("1b"), self._tokens(16), self._a.sweep_rate
        paced = ("--paced", str(rate))
        for budget in self._a.sweep_budgets:
            arms = [ours("on demand", folder, tokens, Limits(), budget, ON_DEMAND, *paced)]
            for recall in self._a.recalls:
                name, more = f"oracle {recall}", ("--recall", str(recall), *paced)
                arms.append(ours(name, folder, tokens, Limits(), budget, ON_DEMAND, *more))
            options, more = (
                ["policy=lru", "predictor=next_gates", "reader=direct"],
                "--always-ahead",
            )
            name = "next_gates, no switch"
            arms.append(ours(name, folder, tokens, Limits(), budget, options, more, *paced))
            arms.append(ours("resident", folder, tokens, Limits(), None, []))
            name = f"1 B, set recall, {budget}"
            yield Case(name, folder, arms, tokens, rate, self._a.pairs)

    def early(self) -> Iterator[Case]:
        """Yield a case for each model whose routers choose early."""
        models = {
            f"1 B {kind}": (self._model(f"1b-{kind}"), self._tokens(16))
            for kind in ("pregated", "preattention")
        }
        if self._a.early_trained is not None:
            models = {"trained, early": (self._a.early_trained, self._tokens(96))}
        for model, (folder, tokens) in models.items():
            limits, budget = Limits(), self._a.early_budget
            paced = ("--paced", str(self._a.rate))
            names = ("on demand", "reads begin early", "resident")
            arms = [
                ours(names[0], folder, tokens, limits, budget, ON_DEMAND, "--not-ahead", *paced),
                ours(names[1], folder, tokens, limits, budget, ON_DEMAND, *paced),
                ours(names[2], folder, tokens, limits, None, []),
            ]
            for predictor in self._a.early_predictors:  # of layers that have not chosen
                options = ["policy=lru", f"predictor={predictor}", "reader=direct"]
                name, more = f"and {predictor}", ("--always-ahead", *paced)
                arms.append(ours(name, folder, tokens, limits, budget, options, *more))
            for recall in self._a.recalls:
                name, more = f"and hints, recall {recall}", ("--recall", str(recall), *paced)
                arms.append(ours(name, folder, tokens, limits, budget, ON_DEMAND, *more))
            name, turns = f"{model}, {budget}", self._a.pairs
            yield Case(name, folder, arms, tokens, self._a.rate, turns, is_early=True)

    def peers(self) -> Iterator[Case]:
        """Yield a case for each share of the experts, then llama.cpp's other ways to load."""
        folder, tokens = self._model(self._a.peer_model), self._tokens(8)
        file = folder.with_name(f"{folder.name}.gguf")
        bench, rate = self._a.llama, self._a.rate
        if bench is None or not file.exists():
            print(f"peers: left out, --llama or {file.name} is missing")
            return
        free = run(llama("", bench, file, tokens, Limits(), "mmap").command, Limits(), folder)
        sizes, there = Sizes.of(folder), Limits(rate)
        for share in self._a.peer_shares:
            slots = int(sizes.experts * share)
            limit = slots + sizes.dense + free.peak_anonymous_bytes
            fewer = max(sizes.experts // 8, limit - sizes.dense - RUNTIME)
            print(
                f"peers: {sizes.dense / 1e6:.0f} MB dense, {sizes.experts / 1e6:.0f} MB of experts;"
                f" llama.cpp takes {free.peak_anonymous_bytes / 1e6:.0f} MB next to its weights; "
                f"cache {slots / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB, in which ours has "
                f"{fewer / 1e6:.0f} MB of slots",
                flush=True,
            )
            there, same = Limits(rate, limit), Limits(rate, slots + sizes.dense + RUNTIME)
            if self._a.dry:
                there = same = Limits(rate)
            arms = [
                llama("llama.cpp mmap", bench, file, tokens, there, "mmap"),
                ours("ours, equal cache", folder, tokens, same, f"{slots}B", ON_DEMAND),
                ours("ours, equal limit", folder, tokens, there, f"{fewer}B", ON_DEMAND),
                ours("ours, resident", folder, tokens, Limits(), None, []),
            ]
            name = f"{folder.name}, {share:.0%} of the experts"
            yield Case(name, folder, arms, tokens, rate, min(FEW, self._a.pairs))
        others = [
            llama("llama.cpp resident", bench, file, tokens, Limits(), "mmap"),
            llama("llama.cpp --load-mode none", bench, file, tokens, there, "none"),
            llama("llama.cpp --load-mode dio", bench, file, tokens, there, "dio"),
        ]
        name = f"{folder.name}, llama.cpp's other ways to load"
        yield Case(name, folder, others, tokens, rate, 1)

    def papers(self) -> Iterator[Case]:
        """Yield accelerate's case."""
        if importlib.util.find_spec("accelerate") is None:
            print("papers: left out, accelerate is not installed")
            return
        folder, tokens = self._model("1b"), self._tokens(4)
        limits, layers = Limits(self._a.rate), 1 if self._a.dry else 10
        arms = [
            accelerate("accelerate", folder, tokens, limits, layers),
            ours("on demand", folder, self._tokens(16), limits, "50%", ON_DEMAND),
        ]
        yield Case("1 B, half in memory", folder, arms, tokens, self._a.rate, 1)

    def _model(self, name: str) -> Path:
        kind = name.partition("-")[2]
        if self._a.dry:
            name = f"tiny-{kind}" if kind else "tiny"
        return self._a.models / name

    def _tokens(self, number: int) -> int:
        return 4 if self._a.dry else self._a.tokens or number
