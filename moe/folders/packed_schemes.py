"""Which matrix of a folder has which format, where ``config_groups`` has more than one."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...errors import ModelFileError
from .compressed_tensors import PackedFormat

PATTERN = "re:"
MOST_REPEATS = 4
"""Of a pattern. With more, or with a repeated bracket, matching may take for ever."""


@dataclass(frozen=True)
class PackedSchemes:
    """Formats by the modules they are for, as compressed-tensors finds them.

    The name of a module counts before a pattern, and a pattern before a class: every class that is
    named has linear layers, and so all matrices.
    """

    schemes: tuple[tuple[PackedFormat, tuple[str, ...]], ...]
    """Formats with their targets."""
    _found: dict[str, PackedFormat] = field(default_factory=dict, compare=False, repr=False)

    def of(self, name: str) -> PackedFormat:
        """Return the format of matrix ``name``, ``X.weight``.

        Raises :class:`ModelFileError` where no target is for it.
        """
        if name not in self._found:
            self._found[name] = self._find(name.removesuffix(".weight"))
        return self._found[name]

    def _find(self, module: str) -> PackedFormat:
        kinds: tuple[Callable[[str], bool], ...] = (
            lambda target: target == module,
            lambda target: target.startswith(PATTERN) and _matches(target, module),
            _is_class,
        )
        for is_for in kinds:
            for packed, targets in self.schemes:
                if any(is_for(target) for target in targets):
                    return packed
        raise ModelFileError(
            f"config.json has quantization_config.config_groups without a target for {module}, "
            "whose weight is quantized; copy the folder again."
        )


def check_targets(path: str, targets: object) -> tuple[str, ...]:
    """Return the targets of a group; :class:`ModelFileError` for what cannot be matched safely."""
    if not isinstance(targets, list) or not targets or not all(type(t) is str for t in targets):
        raise ModelFileError(f"config.json has {path} = {targets!r}; use a list of names.")
    for target in targets:
        if target.startswith(PATTERN) and not _is_safe(target.removeprefix(PATTERN)):
            raise ModelFileError(
                f"config.json has {target[:80]!r} in {path}, which is not read; use patterns with "
                f"at most {MOST_REPEATS} repeats and none of a bracket."
            )
    return tuple(targets)


def expert_targets(modules: Sequence[str]) -> list[str]:
    """Return patterns for matrices of experts, ``<experts>.3.gate_proj``: one for each layer.

    ``modules`` must have all matrices of an expert, or none.
    """
    experts_of: dict[str, dict[str, None]] = {}
    for module in modules:
        prefix, expert, _ = module.rsplit(".", 2)
        experts_of.setdefault(prefix, {})[expert] = None
    return [
        rf"{PATTERN}{re.escape(prefix)}\.({'|'.join(experts)})\.\w+$"
        for prefix, experts in experts_of.items()
    ]


def _is_class(target: str) -> bool:
    return target[:1].isupper()


def _matches(target: str, module: str) -> bool:
    return re.match(target.removeprefix(PATTERN), module) is not None


def _is_safe(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    plain = re.sub(r"\\.", "_", pattern)
    return len(re.findall(r"[*+?{]", plain)) <= MOST_REPEATS and not re.search(r"\)[*+?{]", plain)
