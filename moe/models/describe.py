"""What a loaded model is, in a few lines for a person."""

from ..config.model import LayersConfig
from ..layer import MoELayer
from .model import Model


def describe(decoder: Model) -> str:
    """Return layers, widths, experts, parameters, type, device and what is offloaded."""
    config, layers = decoder.config, [layer for _, layer in decoder.moe_layers()]
    weight = next(decoder.parameters())
    tokens = ""
    if config.reads_tokens:
        tokens = f", vocabulary {config.vocabulary:,}, up to {config.max_positions:,} positions"
    lines = [
        f"layers: {config.num_layers}, {len(layers)} of them with experts",
        f"widths: d_model {config.d_model}, {config.num_heads} heads{tokens}",
    ]
    if config.moe is not None and layers:
        lines.append(
            f"experts: {config.moe.num_experts} a layer of width {config.moe.d_expert}, "
            f"{config.moe.router.k} for a token ({config.moe.router.kind})"
        )
    total, active = count_parameters(decoder)
    lines.append(f"parameters: {total:,}, of them {active:,} for a token")
    share = layers[0].experts.share_in_memory if layers else 1.0
    place = f"weights: {weight.dtype} on {weight.device}"
    lines.append(place if share == 1 else f"{place}; {1 - share:.0%} of the experts are on disk")
    return "".join(f"\n  {line}" for line in lines)


def count_parameters(decoder: Model) -> tuple[int, int]:
    """Return the parameters of a decoder, wherever its experts are, and those a token uses."""
    experts = {p for _, layer in decoder.moe_layers() for p in layer.experts.parameters()}
    dense = sum(p.numel() for p in decoder.parameters() if p not in experts)
    total = active = dense
    for _, layer in decoder.moe_layers():
        size = _expert_size(decoder.config, layer)
        total += layer.num_experts * size
        active += layer.gate.k * size
    return total, active


def _expert_size(config: LayersConfig, layer: MoELayer) -> int:
    moe = config.moe
    assert moe is not None, "a layer without experts"
    biases = moe.fc1_rows + layer.d_model if moe.expert_bias else 0
    return moe.matrices * layer.d_model * layer.d_expert + biases
