"""Attention layers of every kind, and their formula in fp64 for one new position.

B sequences, D model width, Q query heads, G key/value heads, H head width, L positions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeyard.kernels.cpu.attention import AttentionModules, AttentionOptions
from moeyard.moe.kv_cache import KVCacheSpec, SequenceCache

D, Q, G, H = 24, 6, 2, 10
EPSILON = 1e-5
LAYER = 1
"""The layer of two that is tested; the other's keys and values are NaN."""
PAST = (0, 1, 4, 13, 70)
"""Positions in each sequence's cache before the first step."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a layer has; ``numbers`` are fields of :class:`AttentionOptions`."""

    norm: str | None = None
    biases: str = ""
    has_sinks: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "norm_of_heads": Case(norm="head"),
    "norm_of_projections": Case(norm="projection"),
    "q_bias": Case(biases="q"),
    "k_bias": Case(biases="k"),
    "v_bias": Case(biases="v"),
    "o_bias": Case(biases="o"),
    "clip": Case(numbers={"clip": 0.6}),
    "no_positions": Case(numbers={"rotates": False}),
    "window_of_one": Case(numbers={"window": 1}),
    "window": Case(numbers={"window": 5}),
    "sinks": Case(has_sinks=True),
    "scale": Case(numbers={"scale": 0.9}),
    "gpt_oss": Case(biases="qkvo", has_sinks=True, numbers={"window": 5}),
    "olmoe": Case(norm="projection", numbers={"clip": 0.6}),
    "smallthinker": Case(numbers={"window": 5, "rotates": False}),
    "all": Case(
        norm="head",
        biases="qkvo",
        has_sinks=True,
        numbers={"clip": 0.9, "window": 5, "rotates": False, "scale": 0.9},
    ),
}


def layer(case: Case, dtype: torch.dtype) -> tuple[AttentionModules, AttentionOptions]:
    torch.manual_seed(0)
    widths = {"q": (D, Q * H), "k": (D, G * H), "v": (D, G * H), "o": (Q * H, D)}
    parts: dict[str, Any] = {n: nn.Linear(*w, bias=n in case.biases) for n, w in widths.items()}
    parts |= {"input_norm": nn.RMSNorm(D), "output_norm": nn.RMSNorm(D)}
    is_whole = case.norm == "projection"
    for name, heads in (("q_norm", Q), ("k_norm", G)):
        parts[name] = nn.RMSNorm(heads * H if is_whole else H) if case.norm else None
    parts["attention"] = nn.Module()
    parts["attention"].sinks = nn.Parameter(torch.empty(Q)) if case.has_sinks else None
    for part in parts.values():
        for name, parameter in part.named_parameters() if part is not None else ():
            if isinstance(part, nn.RMSNorm):
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=D**-0.5 if name == "weight" else 1.0)
            parameter.data = parameter.data.to(dtype)
    numbers = {"scale": H**-0.5} | case.numbers
    options = AttentionOptions(num_heads=Q, num_kv_heads=G, head_dim=H, epsilon=EPSILON, **numbers)
    return AttentionModules(**parts), options


def inputs(dtype: torch.dtype, past: tuple[int, ...], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``[B, D]`` rows that belong to their sequences, and their cosines and sines."""
    rows = [torch.randn(D, generator=torch.Generator().manual_seed(100 * n + step)) for n in past]
    angles_Bh = (torch.tensor(past) + step).unsqueeze(1) * 0.3 ** torch.arange(H // 2)
    angles_BH = torch.cat([angles_Bh, angles_Bh], dim=1)
    return (0.1 * torch.stack(rows)).to(dtype), angles_BH.cos().to(dtype), angles_BH.sin().to(dtype)


def caches_of(dtype: torch.dtype, past: tuple[int, ...]) -> tuple[list[SequenceCache], list]:
    """Return caches with random positions, and those as fp64 keys and values, ``[G, L, H]``."""
    caches, known = [], []
    for length in past:
        generator = torch.Generator().manual_seed(length)
        keys_GLH, values_GLH = torch.randn(2, G, length, H, generator=generator).to(dtype)
        cache = SequenceCache([KVCacheSpec(G, H, H, dtype)] * 2, 80, torch.device("cpu"))
        cache.reserve(max(1, length))
        cache.append(0, *torch.full((2, G, length, H), torch.nan))
        cache.append(LAYER, keys_GLH, values_GLH)
        cache.length = length
        caches.append(cache)
        known.append([keys_GLH.double(), values_GLH.double()])
    return caches, known


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    return norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def product(x: Tensor, linear: nn.Module) -> Tensor:
    y = linear.weight.double() @ x
    return y if linear.bias is None else y + linear.bias.double()


def heads_of(x: Tensor, norm: nn.Module | None, options: AttentionOptions) -> Tensor:
    if norm is not None and len(norm.weight) == len(x) != H:
        x, norm = normed(x, norm), None
    x = x.view(-1, H)
    x = x if norm is None else normed(x, norm)
    return x if options.clip is None else x.clamp(-options.clip, options.clip)


def rotated(x: Tensor, cosine_H: Tensor, sine_H: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine_H + torch.cat([-second, first], dim=-1) * sine_H


def formula(
    modules: AttentionModules,
    options: AttentionOptions,
    x_D: Tensor,
    rope: tuple[Tensor, Tensor],
    known: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return one sequence's residual stream and its norm in fp64; extend ``known``."""
    seen_D = normed(x_D, modules.input_norm)
    q_QH = heads_of(product(seen_D, modules.q), modules.q_norm, options)
    k_GH = heads_of(product(seen_D, modules.k), modules.k_norm, options)
    v_GH = heads_of(product(seen_D, modules.v), None, options)
    if options.rotates:
        q_QH, k_GH = rotated(q_QH, *rope), rotated(k_GH, *rope)
    for index, new_GH in enumerate((k_GH, v_GH)):
        known[index] = torch.cat([known[index], new_GH.unsqueeze(1)], dim=1)
    position = known[0].shape[1] - 1
    visible = [p for p in range(position + 1) if p > position - (options.window or position + 1)]
    out = []
    for q in range(Q):
        keys_LH, values_LH = (part[q // (Q // G), visible] for part in known)
        logits_L = options.scale * (keys_LH @ q_QH[q])
        if modules.attention.sinks is not None:
            logits_L = torch.cat([logits_L, modules.attention.sinks[q : q + 1].double()])
        out.append(logits_L.softmax(0)[: len(visible)] @ values_LH)
    y_D = x_D + product(torch.cat(out), modules.o)
    return y_D, normed(y_D, modules.output_norm)


def expected_step(modules, options, step_inputs, known) -> list[Tensor]:
    x_BD, *rope = (part.double() for part in step_inputs)
    rows = [
        formula(modules, options, x_D, (cosine_H, sine_H), known[b])
        for b, (x_D, cosine_H, sine_H) in enumerate(zip(x_BD, *rope, strict=True))
    ]
    return [torch.stack(part) for part in zip(*rows, strict=True)]
