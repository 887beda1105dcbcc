"""What rows of sequences with a cache cost on the C++ kernels, and what int8 costs in perplexity.

    python benchmarks/cached_rows.py speed MODEL_DIR
    python benchmarks/cached_rows.py loss MODEL_DIR TEXT.txt [--tokens 20000]

``speed``: processor time of a prompt's forward and of a step after it, on one thread. "torch" is
the path that prompts took before: the modules one by one, with torch's attention, and the same C++
products. The kinds take turns. ``loss``: perplexity of windows of 1,024 tokens, read with a cache
in chunks of 256.

L tokens of a window, V vocabulary.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import moeyard
from moeyard.moe.attention import parts
from moeyard.moe.batch import batch_of
from moeyard.moe.kv_blocks import BLOCK, BlockCache, KVBlocks, KVDtype, bytes_per_block
from moeyard.moe.models.decoder import Decoder

WINDOW, CHUNK = 1024, 256
STEPS = 8


def cache_of(decoder: Decoder, num_positions: int, dtype: KVDtype | None = None) -> BlockCache:
    """Return an empty cache with blocks for all positions."""
    specs = [layer.self_attn.cache_spec() for layer in decoder.layers]
    num_blocks = -(-num_positions // BLOCK)
    cache = BlockCache(KVBlocks(specs, num_blocks, torch.device("cpu"), dtype), num_positions)
    cache.add_blocks(range(num_blocks))
    return cache


def timed(
    decoder: Decoder, ids_L: torch.Tensor, dtype: KVDtype | None = None
) -> tuple[float, float]:
    """Return processor seconds of a prompt in one chunk, and of a step after it."""
    cache = cache_of(decoder, len(ids_L) + STEPS, dtype)
    start = time.process_time()
    decoder(batch_of([ids_L], [cache]))
    middle = time.process_time()
    for _ in range(STEPS):
        decoder(batch_of([ids_L[:1]], [cache]))
    return middle - start, (time.process_time() - middle) / STEPS


@torch.inference_mode()
def speed(decoder: Decoder, lengths: list[int], rounds: int) -> None:
    """Print the times of both paths, medians of rounds that take turns."""
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids_L = torch.randint(0, decoder.config.vocabulary, (length,), generator=generator)
        found: dict[str, list[tuple[float, float]]] = {"kernels": [], "torch": [], "int8": []}
        for _ in range(rounds + 1):
            found["kernels"].append(timed(decoder, ids_L))
            with patch.object(parts, "can_attend_rows", lambda rope: False):
                found["torch"].append(timed(decoder, ids_L))
            found["int8"].append(timed(decoder, ids_L, "int8"))
        for place, name in enumerate(("prompt", "step")):
            times = {kind: [pair[place] for pair in some[1:]] for kind, some in found.items()}
            medians = {kind: statistics.median(some) for kind, some in times.items()}
            ratios = [a / b for a, b in zip(times["kernels"], times["torch"], strict=True)]
            print(
                f"{length:5} tokens, {name:6}: "
                + ", ".join(f"{kind} {1000 * value:8.1f} ms" for kind, value in medians.items())
                + f"; kernels / torch {statistics.median(ratios):.2f}"
                + f" ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


@torch.inference_mode()
def loss(decoder: Decoder, ids_L: torch.Tensor, new_cache: Callable[[int], BlockCache]) -> float:
    """Return the mean cross-entropy of the windows' tokens, in nats."""
    total, count = 0.0, 0
    for window_L in ids_L.split(WINDOW + 1):
        cache = new_cache(len(window_L))
        for start in range(0, len(window_L) - 1, CHUNK):
            end = min(start + CHUNK, len(window_L) - 1)
            hidden_LD = decoder(batch_of([window_L[start:end]], [cache])).hidden_TD
            logits_LV = decoder.logits(hidden_LD).float()
            targets_L = window_L[start + 1 : end + 1]
            total += float(F.cross_entropy(logits_LV, targets_L, reduction="sum"))
            count += len(targets_L)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("speed", "loss"))
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--layers", type=int, help="use the first layers only")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = moeyard.load(arguments.model)
    decoder = model.decoder
    if arguments.what == "speed":
        torch.set_num_threads(1)
        decoder.layers = decoder.layers[: arguments.layers]
        speed(decoder, arguments.lengths, arguments.rounds)
        return
    text = arguments.text.read_text(encoding="utf-8")[: 4 * arguments.tokens]
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids_L = torch.tensor(ids[: arguments.tokens])
    specs = [layer.self_attn.cache_spec() for layer in decoder.layers]
    for name in (None, "int8"):
        nats = loss(decoder, ids_L, lambda count, dtype=name: cache_of(decoder, count, dtype))
        per_position = bytes_per_block(specs, name) / BLOCK
        print(
            f"{name or specs[0].dtype}: perplexity {math.exp(nats):.5f} ({nats:.6f} nats), "
            f"{per_position:,.0f} bytes per position",
            flush=True,
        )


if __name__ == "__main__":
    main()
