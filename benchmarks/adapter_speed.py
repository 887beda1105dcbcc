"""What rows that go through a LoRA adapter cost in decoding, next to rows of the model alone.

    python benchmarks/adapter_speed.py MODEL [--expert-memory 25%] [--rounds 3]

Random adapters of rank 8 on attention, on experts, or on both. Requests of 32 ids decode 40 tokens
in the engine, in bf16 on one thread. Tokens per second of this process's CPU time, best of the
rounds, because other programs may share the machine. Cases take turns.
"""

import argparse
from time import process_time

import torch
from torch import nn

from moeyard.kernels.values.expert_update import ExpertUpdate
from moeyard.moe.adapters.adapter import Adapter, LowRankLinear
from moeyard.moe.linear import Linear
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.loading import open_model

from report import write_results

RANK = 8
PROMPT, NEW_TOKENS = 32, 40
GREEDY = SamplingParams(temperature=0)


def random_adapter(decoder: Decoder, name: str, on: tuple[str, ...]) -> Adapter:
    """Return an adapter of small random numbers on ``attention``, ``experts`` or both."""
    moe, d_model = decoder.config.moe, decoder.config.d_model
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape: int) -> torch.Tensor:
        return (0.01 * torch.randn(shape, generator=generator)).bfloat16()

    linears: dict[nn.Module, LowRankLinear] = {}
    experts: dict[nn.Module, ExpertUpdate] = {}
    for module_name, module in decoder.named_modules():
        if "attention" in on and ".self_attn." in module_name and isinstance(module, Linear):
            pair = draw(RANK, module.in_features), draw(module.out_features, RANK)
            linears[module] = LowRankLinear(*pair)
    for _, layer in decoder.moe_layers():
        if "experts" in on and moe is not None:
            count, width = moe.num_experts, moe.d_expert
            fc1 = draw(count, 2 * RANK, d_model), draw(count, 2 * width, 2 * RANK)
            fc2 = draw(count, RANK, width), draw(count, d_model, RANK)
            experts[layer.experts] = ExpertUpdate(fc1, fc2)
    return Adapter(name, linears, experts, bool(linears))


def tokens_per_s(engine: Engine, adapters: list[Adapter | None]) -> float:
    """Decode a request for each of the adapters and return tokens per second of CPU time."""
    generator = torch.Generator().manual_seed(0)
    for index, adapter in enumerate(adapters):
        ids = torch.randint(0, 255, (PROMPT,), generator=generator).tolist()
        options = {"ignore_eos": True, "adapter": adapter}
        engine.add(GenerationRequest(str(index), tuple(ids), NEW_TOKENS, GREEDY, **options))
    tokens, started = 0, None
    while engine.has_work:
        events = engine.step()
        if started is not None:
            tokens += len(events)
        elif len(events) == len(adapters):  # all prompts are read
            started = process_time()
    assert started is not None
    return tokens / (process_time() - started)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--expert-memory")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, store = open_model(given.model, "bfloat16", expert_memory=given.expert_memory)
    engine = Engine(model, lambda ids: "", store, max_num_seqs=8)
    attention = random_adapter(model.decoder, "attention", ("attention",))
    experts = random_adapter(model.decoder, "experts", ("experts",))
    both = [random_adapter(model.decoder, name, ("attention", "experts")) for name in ("a", "bb")]
    cases: dict[str, list[Adapter | None]] = {
        "1 row of the model": [None],
        "1 row, adapter of attention": [attention],
        "1 row, adapter of experts": [experts],
        "1 row, adapter of both": [both[0]],
        "8 rows of the model": [None] * 8,
        "8 rows of one adapter of both": [both[0]] * 8,
        "4 rows of the model, 2 and 2 of two adapters": [None] * 4 + [both[0]] * 2 + [both[1]] * 2,
    }
    best = dict.fromkeys(cases, 0.0)
    for _ in range(given.rounds):
        for name, adapters in cases.items():
            best[name] = max(best[name], tokens_per_s(engine, adapters))
    lines = [f"{'':48}tokens/s", *(f"{name:48}{rate:8.1f}" for name, rate in best.items())]
    print("\n".join(lines))
    write_results("adapter_speed", {"tokens_per_s": best})


if __name__ == "__main__":
    main()
