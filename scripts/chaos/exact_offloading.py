"""Does a model with few of its experts in memory ever compute other logits than with all of them?

    python scripts/chaos/exact_offloading.py [--minutes 2] [--seed 0]

Draws small models, and stores for them: share in memory, policy, predictor, reader, threads of
reads in C++ or Python. The speed of the disk changes with every forward, so reads end at any
moment: long before their layer, while it waits, or behind later ones. The logits of each forward
are compared bit by bit with those of the model in memory. Exits with 1 where some differ.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "serving"), str(ROOT / "benchmarks")]

import torch
from paced_disk import PacedDisk
from torch import Tensor

from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.language_model import LanguageModel
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.reading.native import library
from moeyard.serving.loading import open_model

from bounded import scratch
from small_model import CONFIG, write_decoder

RATES = (None, 2e9, 5e8, 1e8, 3e7)
"""Bytes a second; an expert has 6 KB."""
LOOKAHEADS = ("ffn_input", "attention_input", "previous_block")
READERS = ("buffered", "direct")
POLICIES = ("lru", "lfu", "decayed_lfu")
STORES, ANSWERS = 3, 3
"""Stores of a model, and answers of a store."""


@dataclass(frozen=True, slots=True)
class Store:
    """What a store is opened with."""

    share: str
    policy: str
    predictor: str
    reader: str
    is_native: bool
    """Whether C++ reads."""

    @staticmethod
    def drawn(draw: random.Random, lookahead: str) -> "Store":
        """Draw one that a model with such routers may have."""
        predictors = ["none", "next_gates", "next_gates"]
        if lookahead != "previous_block":
            predictors += ["previous_token", "previous_layers"]
        share = f"{draw.choice((25, 30, 50, 75, 90))}%"
        names = (draw.choice(POLICIES), draw.choice(predictors), draw.choice(READERS))
        return Store(share, *names, is_native=draw.random() < 0.8)


def write_model(folder: Path, draw: random.Random) -> str:
    """Write a random model; return when its routers choose."""
    lookahead = draw.choice(LOOKAHEADS)
    router = TopK(k=draw.choice((1, 2, 3)), lookahead=lookahead)
    moe = MoEConfig(num_experts=draw.choice((6, 8, 12)), d_expert=20, router=router)
    layers = {"num_layers": draw.choice((3, 5, 9)), "dense_layers": (1,)}
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe, **layers}))
    initialize(decoder, draw.randrange(1000))
    for name, parameter in decoder.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
    write_decoder(folder, decoder, eos_id=256)
    return lookahead


def keep_logits(model: LanguageModel, before: Callable[[], None]) -> list[Tensor]:
    """Return a list that gets each forward's logits; ``before`` is called before it grows."""
    kept: list[Tensor] = []
    plain = model.decoder.logits

    def keeping(hidden_TD: Tensor) -> Tensor:
        before()
        logits_TV = plain(hidden_TD)
        kept.append(logits_TV.clone())
        return logits_TV

    model.decoder.logits = keeping
    return kept


def answer(model: LanguageModel, tokens: int, seed: int) -> str:
    """Return a text that is drawn at random."""
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": seed}
    return "".join(model.stream("The", tokens, **drawn, ignore_eos=True))


def compare(folder: Path, lookahead: str, draw: random.Random, disk: PacedDisk) -> tuple[int, bool]:
    """Compare a model's stores with the model; return the forwards, and whether all were equal."""
    model, _ = open_model(folder)
    expected = keep_logits(model, lambda: None)
    forwards, is_good = 0, True
    native = library.load()

    def change_rate() -> None:
        disk.bytes_per_s = draw.choice(RATES)

    for _ in range(STORES):
        kind = Store.drawn(draw, lookahead)
        library._loaded[:] = [native if kind.is_native else None]
        options = StoreOptions(kind.policy, reader=kind.reader, predictor=kind.predictor)
        offloaded, store = open_model(folder, expert_memory=kind.share, options=options)
        assert store is not None
        if store._ahead is not None:
            store._ahead._switch = AlwaysOn()
        found = keep_logits(offloaded, change_rate)
        for _ in range(ANSWERS):
            tokens, seed = draw.choice((16, 64, 200)), draw.randrange(1 << 20)
            expected.clear()
            found.clear()
            texts = answer(model, tokens, seed), answer(offloaded, tokens, seed)
            pairs = enumerate(zip(expected, found, strict=False))
            bad = [n for n, (one, other) in pairs if not torch.equal(one, other)]
            if bad or texts[0] != texts[1] or len(expected) != len(found):
                where = f"forward {bad[0]}" if bad else "no forward, but texts"
                print(f"DIFFERENT {lookahead} {asdict(kind)} seed {seed}: {where}", flush=True)
                is_good = False
            forwards += len(found)
        store.close()
    library._loaded[:] = [native]
    return forwards, is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, disk = random.Random(arguments.seed), PacedDisk()
    torch.set_num_threads(1)
    print(f"seed {arguments.seed}", flush=True)
    models = forwards = wrong = 0
    said = time.monotonic()
    until = said + 60 * arguments.minutes
    with scratch() as folder:
        while time.monotonic() < until:
            own = folder / str(models)
            lookahead = write_model(own, draw)
            count, is_good = compare(own, lookahead, draw, disk)
            models, forwards, wrong = models + 1, forwards + count, wrong + (not is_good)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{models} models, {forwards} forwards, {wrong} differ", flush=True)
    print(f"{models} models, {forwards} forwards, {wrong} models differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
