"""How each routed expert of a folder is rounded: all alike, or some to fewer bits than others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import ModelFileError
from ..config.model import LayersConfig
from .compressed_tensors import PackedFormat
from .expert_layouts import ExpertLayout, SeparateExperts, part_shapes
from .group_sparse_format import StoredFormat
from .packed_schemes import PackedSchemes

Key = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True, slots=True)
class ExpertFormats:
    """The formats of a model's experts, and which expert has which."""

    kinds: tuple[StoredFormat | None, ...]
    """Those that occur, the widest first; None = not rounded."""
    kind_of: Mapping[Key, int] = field(default_factory=dict)
    """Index into ``kinds`` of each expert; empty if there is one kind."""

    def kind(self, key: Key) -> int:
        """Return the index of an expert's format."""
        return self.kind_of.get(key, 0)

    def experts(self, layer: int, num_experts: int, kind: int) -> list[int]:
        """Return the experts of a layer that have a kind."""
        return [expert for expert in range(num_experts) if self.kind((layer, expert)) == kind]

    def counts(self, config: LayersConfig) -> tuple[int, ...]:
        """Return how many experts of a model have each kind."""
        if len(self.kinds) > 1:
            found = list(self.kind_of.values())
            return tuple(found.count(kind) for kind in range(len(self.kinds)))
        num_experts = 0 if config.moe is None else config.moe.num_experts
        return (len(config.moe_layers) * num_experts,)


def formats_of(
    packed: StoredFormat | PackedSchemes | None, config: LayersConfig, layout: ExpertLayout
) -> ExpertFormats:
    """Return the formats of a folder's experts.

    Raises :class:`ModelFileError` if the matrices of one expert have several, and for layouts whose
    experts are not separate.
    """
    moe = config.moe
    if not isinstance(packed, PackedSchemes) or moe is None:
        return ExpertFormats((None if isinstance(packed, PackedSchemes) else packed,))
    if not isinstance(layout, SeparateExperts):
        raise ModelFileError(
            "config.json has several kinds of weights in quantization_config.config_groups, but "
            "the experts of this family are stored together; use a model with one kind."
        )
    matrices = [part for part, shape in part_shapes(moe, config.d_model).items() if len(shape) == 2]
    format_of: dict[Key, PackedFormat] = {}
    for layer in config.moe_layers:
        for expert in range(moe.num_experts):
            found = {packed.of(layout.name(layer, expert, part)) for part in matrices}
            if len(found) > 1:
                raise ModelFileError(
                    f"expert {expert} of layer {layer} has matrices of {len(found)} kinds in "
                    "config.json; only experts of one kind each are read."
                )
            format_of[layer, expert] = found.pop()
    kinds = sorted(set(format_of.values()), key=_width, reverse=True)
    if len(kinds) == 1:
        return ExpertFormats((kinds[0],))
    return ExpertFormats(tuple(kinds), {key: kinds.index(p) for key, p in format_of.items()})


def _width(packed: PackedFormat) -> tuple[int, int]:
    """Sort by the bytes of a matrix: bits first, then scales."""
    return packed.bits, -(packed.group_size or 1 << 30)
