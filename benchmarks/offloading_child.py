"""One run of benchmarks/offloading.py: generate two texts and report on the second one.

The first one fills the slots. Both are drawn with fixed seeds, so that every run that is exact
takes the same routes. Prints one JSON object.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import torch
from oracle_predictor import Oracle
from paced_disk import PacedDisk
from torch import Tensor

from moeyard.moe.models.language_model import LanguageModel
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.predictors.table import facts_of
from moeyard.serving.experts.store import ExpertStore
from moeyard.serving.loading import open_model
from moeyard.settled import settle

COUNTED = ("hits", "misses", "prefetch_issued", "prefetch_useful", "prefetch_late",
           "prefetch_wasted", "bytes_read", "stall_s")  # fmt: skip


WARM_UP, MEASURED = 1, 0
"""Seeds of the two texts."""


def generate(model: LanguageModel, arguments: argparse.Namespace, seed: int) -> tuple[float, str]:
    """Return seconds and the answer."""
    started = time.perf_counter()
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": seed}
    text = "".join(model.stream(arguments.prompt, arguments.tokens, **drawn, ignore_eos=True))
    return time.perf_counter() - started, text


def hash_logits(model: LanguageModel) -> list[str]:
    """Return a list that gets a short hash of each forward's logits: a text hides small errors."""
    hashes: list[str] = []
    plain = model.decoder.logits

    def hashed(hidden_TD: Tensor) -> Tensor:
        logits_TV = plain(hidden_TD)
        digest = hashlib.sha256(logits_TV.float().contiguous().numpy().tobytes())
        hashes.append(digest.hexdigest()[:4])
        return logits_TV

    model.decoder.logits = hashed
    return hashes


def totals(store: ExpertStore | None) -> dict[str, float]:
    """Return the store's counters over all layers."""
    if store is None:
        return {}
    layers = store.statistics.layers.values()
    return {name: sum(getattr(layer, name) for layer in layers) for name in COUNTED}


def memory_kib() -> dict[str, int]:
    """Return this process's memory now, and at its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    lines = dict(line.split(":", 1) for line in status)
    return {name: int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def foretell(store: ExpertStore, arguments: argparse.Namespace) -> None:
    """Give the store a predictor that knows this run, from a run with all experts in memory."""
    model, _ = open_model(arguments.model, arguments.dtype)
    facts = facts_of(model.decoder.config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routes"
        with recording(model.decoder, path, written_by="offloading"):
            for seed in (WARM_UP, MEASURED):
                generate(model, arguments, seed)
        oracle = Oracle(facts, RouteFile(path).read(), arguments.recall)
    store.predict(oracle, facts, AlwaysOn())


def options_of(arguments: argparse.Namespace) -> StoreOptions:
    """Return the store's options from ``name=value`` texts."""
    values = dict(text.split("=", 1) for text in arguments.option)
    return StoreOptions(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="The")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--expert-memory")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--recall", type=float, help="read ahead what an oracle names")
    parser.add_argument("--always-ahead", action="store_true", help="no switch")
    parser.add_argument("--not-ahead", action="store_true", help="early routers announce nothing")
    parser.add_argument("--paced", type=float, metavar="MB_S", help="see paced_disk.py")
    arguments = parser.parse_args()
    if arguments.paced is not None:
        PacedDisk(arguments.paced * 1e6)
    torch.set_num_threads(arguments.threads)
    options = None if arguments.expert_memory is None else options_of(arguments)
    model, store = open_model(
        arguments.model, arguments.dtype, expert_memory=arguments.expert_memory, options=options
    )
    if arguments.recall is not None:
        assert store is not None, "an oracle needs a store"
        foretell(store, arguments)
    if arguments.always_ahead:
        assert store is not None and store._ahead is not None, "nothing reads ahead"
        store._ahead._switch = AlwaysOn()
    if arguments.not_ahead:
        for _, layer in model.decoder.moe_layers():
            layer.experts.announce = lambda *_: None
    hashes = hash_logits(model)
    settle()  # as commands do
    _, first_text = generate(model, arguments, WARM_UP)
    before = totals(store)
    seconds, text = generate(model, arguments, MEASURED)
    moved = {name: value - before[name] for name, value in totals(store).items()}
    result = {
        "tokens": arguments.tokens,
        "tokens_per_s": arguments.tokens / seconds,
        "slots": None if store is None else store.num_slots,
        "slot_bytes": None if store is None else store.slot_bytes,
        "texts": [first_text, text],
        "logits": hashes,
        "memory_kib": memory_kib(),
        **moved,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
