"""Which layer of a decoder each module of an adapter folder is.

Names are those of the folder's family and those of transformers 5, which keeps the experts of a
layer in two parameters, ``mlp.experts.gate_up_proj`` and ``mlp.experts.down_proj``.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ....errors import ModelFileError
from ...linear import Linear
from ...models.decoder import Decoder
from ..expert_layouts import SeparateExperts
from ..families.family import Family, full_name
from .config import LoraConfig

FUSED_PARTS = ("gate_up", "down")
"""The experts' parameters in the order in which transformers' modules have them: peft wraps the
first one first, so that it is the innermost."""
_FUSED = re.compile(r"model\.layers\.([0-9]{1,6})\.mlp\.experts((?:\.base_layer)*)")
_UNSUPPORTED = {
    ".gate": "a router; routers keep their weights here",
    "lm_head": "the head; the head keeps its weights here",
}


class ExpertPart(NamedTuple):
    """A matrix of one expert, or of all experts of a layer."""

    layer: int
    part: str
    """``gate``, ``up``, ``down``, or of all experts ``gate_up``."""
    expert: int | None = None
    """None = all."""


class ModuleNames:
    """The modules of a decoder by the names that adapter folders use."""

    def __init__(self, decoder: Decoder, family: Family) -> None:
        self._linears = dict(_linears(decoder, family))
        self._experts = dict(_experts(decoder, family))
        moe = decoder.config.moe
        self._has_gate = moe is None or "gate" in moe.fc1_parts
        self._moe_layers = {layer for layer, _ in decoder.moe_layers()}

    def find(
        self, name: str, names: set[str], config: LoraConfig
    ) -> tuple[str, Linear | ExpertPart]:
        """Return the name that patterns of ``config`` match, and the layer or part of experts.

        ``names`` are all modules of the folder. Raises :class:`ModelFileError` for a module that
        the model does not have, or whose weights stay as they are.
        """
        if name in self._linears:
            return name, self._linears[name]
        if name in self._experts:
            return name, self._experts[name]
        match = _FUSED.fullmatch(name)
        if match is not None and int(match[1]) in self._moe_layers:
            if not self._has_gate:
                raise ModelFileError(
                    f"the adapter changes all experts of {name[:120]!r} together, as transformers "
                    "has them, but these have no gate; name up_proj and down_proj of each expert."
                )
            path = name.removesuffix(match[2])
            wrapped = [n for n in names if re.fullmatch(re.escape(path) + r"(\.base_layer)*", n)]
            part = _fused_part(path, match[2].count("."), len(wrapped), config)
            return f"{path}.{part}_proj", ExpertPart(int(match[1]), part)
        for end, what in _UNSUPPORTED.items():
            if name.endswith(end):
                raise ModelFileError(f"the adapter changes {name}, {what}; train without it.")
        raise ModelFileError(
            f"the adapter changes {name[:120]!r}, which this model does not have; it belongs to "
            "another model."
        )


def _fused_part(path: str, depth: int, num_wrapped: int, config: LoraConfig) -> str:
    """Return which parameter a wrapper is for: the innermost one has the most ``base_layer``."""
    targets = config.target_parameters
    parts = [part for part in FUSED_PARTS if any(name.endswith(f"{part}_proj") for name in targets)]
    if len(parts) != num_wrapped or depth >= num_wrapped:
        raise ModelFileError(
            f"the adapter has {num_wrapped} pairs of factors for {path}, but target_parameters "
            f"{list(targets)}; name gate_up_proj and down_proj of the experts there."
        )
    return parts[num_wrapped - 1 - depth]


def _linears(decoder: Decoder, family: Family) -> Iterator[tuple[str, Linear]]:
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            for full in (full_name(f"{name}.weight"), family.tensor_name(f"{name}.weight")):
                yield full.removesuffix(".weight"), module


def _experts(decoder: Decoder, family: Family) -> Iterator[tuple[str, ExpertPart]]:
    layouts = [SeparateExperts()]
    if isinstance(family.experts, SeparateExperts):
        layouts.append(family.experts)
    if decoder.config.moe is None:
        return
    part_names = (*decoder.config.moe.fc1_parts, "down")
    for layer, moe in decoder.moe_layers():
        for expert in range(moe.num_experts):
            for part in part_names:
                for layout in layouts:
                    name = layout.name(layer, expert, part).removesuffix(".weight")
                    yield name, ExpertPart(layer, part, expert)
