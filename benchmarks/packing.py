"""What does it cost to keep packed documents apart?

    python benchmarks/packing.py

Windows of random documents of several mean lengths (exponential, so that short ones are many).
1. The attention of one layer, forward and backward, in every way tried: whole windows (no
   borders), a call per document, a block-diagonal mask, and groups of documents with lengths
   rounded up to the next power of two over 1, 4 and 8 (8 is what moe/models/documents.py does).
2. Forward and backward of a whole model, train.packing=documents against whole windows.
Ratios of CPU time on one thread to whole windows in the same run, interleaved, medians.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeyard.moe.attention.grouped_query import Attention
from moeyard.moe.batch import Packing
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.models import documents as packing
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.training.objectives.next_token import NextToken

from report import write_results

EOS = 0
TOKENS = 4096
MODEL = {
    "d_model": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 4096,
    "max_positions": 1024,
    "moe": {"num_experts": 8, "d_expert": 256, "router": {"kind": "topk", "k": 2}},
}
SIZES = [(length, mean) for length in (256, 1024) for mean in (8, 32, 128, 512)]
"""(tokens of a window, mean tokens of a document)."""


def windows_of(length: int, mean: int) -> torch.Tensor:
    ids_BL1 = torch.randint(1, 4096, (TOKENS // length, length + 1))
    ids_BL1[torch.rand(ids_BL1.shape) < 1 / mean] = EOS
    return ids_BL1


def medians(ways: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Return CPU seconds of forward and backward."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            started = time.process_time()
            run().backward()
            if number:  # the first warms up
                times[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def packed_with(steps: int, ids_BL: torch.Tensor) -> Packing:
    kept, packing.STEPS = packing.STEPS, steps
    found = packing.batch_of_documents(ids_BL, EOS).packing
    packing.STEPS = kept
    assert found is not None
    return found


def attention_ways(length: int, mean: int) -> dict[str, Callable[[], torch.Tensor]]:
    attention = Attention(ModelConfig.model_validate(MODEL), 0)
    ids_BL = windows_of(length, mean)[:, :-1]
    batch = packing.batch_of_documents(ids_BL, EOS)
    q, k, v = (torch.randn(TOKENS, n, 32, requires_grad=True) for n in (4, 2, 2))
    documents_T = torch.repeat_interleave(torch.tensor(batch.lengths))
    documents_BL = documents_T.view_as(ids_BL)

    def masked() -> torch.Tensor:
        same_BLL = documents_BL.unsqueeze(2) == documents_BL.unsqueeze(1)
        parts = [t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v)]
        keys, values = (t.repeat_interleave(2, dim=1) for t in parts[1:])
        mask = same_BLL.tril().unsqueeze(1)
        return F.scaled_dot_product_attention(parts[0], keys, values, mask).sum()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "whole windows": lambda: attention._uniform(q, k, v, length).sum(),
        "call per document": lambda: attention._ragged(q, k, v, batch).sum(),
        "mask": masked,
    }
    for steps in (1, 4, 8):
        found = packed_with(steps, ids_BL)
        ways[f"groups/{steps}"] = lambda found=found: attention._packed(q, k, v, found).sum()
    return ways


def model_ways(length: int, mean: int) -> dict[str, Callable[[], torch.Tensor]]:
    decoder = Decoder(ModelConfig.model_validate(MODEL))
    initialize(decoder, 0)
    windows = windows_of(length, mean)
    return {
        "whole windows": lambda: NextToken(decoder)(windows).loss_sum,
        "packing=documents": lambda: NextToken(decoder, EOS)(windows).loss_sum,
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = []
    for question, ways_of, rounds in (
        ("attention", attention_ways, 7),
        ("model", model_ways, 5),
    ):
        for length, mean in SIZES:
            found = medians(ways_of(length, mean), rounds)
            whole = found["whole windows"]
            ratios = {name: seconds / whole for name, seconds in found.items()}
            table.append(
                {
                    "of": question,
                    "window": length,
                    "mean_document": mean,
                    "whole_windows_ms": 1e3 * whole,
                    "ratio_to_whole_windows": ratios,
                }
            )
            shown = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"{question:9} window {length:4} document {mean:3}:  {shown}", flush=True)
    path = write_results(
        "packing", {"question": "what does it cost to keep documents apart", "table": table}
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
