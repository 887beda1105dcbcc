"""``adapter_config.json``: what moeyard reads of it, and what it refuses."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ....errors import ModelFileError
from ..json_file import read_json

FILE = "adapter_config.json"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "use_bdlora": (False,),
    "kasa_config": (),
    "velora_config": (),
    "monteclora_config": (),
    "arrow_config": (),
}
"""Keys that change what an adapter computes, and the values that change nothing; null is one of
them, except for ``peft_type``."""

MAX_PATTERN_LENGTH = 200


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Ranks and factors of an adapter."""

    rank: int
    alpha: float
    use_rslora: bool = False
    """Divide alpha by the root of the rank (rsLoRA, Kalajdzievski 2023)."""
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    """Other ranks and alphas for modules whose name ends as a regular expression says."""
    target_parameters: tuple[str, ...] = ()
    """Parameters of modules that are adapted, such as ``mlp.experts.gate_up_proj``."""

    def rank_of(self, module: str) -> int:
        """Return r of a module."""
        return int(_find(self.rank_pattern, module, self.rank))

    def scale(self, module: str) -> float:
        """Return s, the factor on ``B A`` of a module."""
        rank = self.rank_of(module)
        alpha = _find(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(folder: Path) -> LoraConfig:
    """Read the configuration of an adapter folder.

    Raises :class:`ModelFileError` for damaged ones, and for what moeyard does not compute: DoRA,
    biases, other types than LoRA, and layers that are trained as a whole.
    """
    if not (folder / FILE).exists():
        raise ModelFileError(f"{folder} has no {FILE}; give a folder that peft has written.")
    values = read_json(folder / FILE)
    for key, neutral in _NEUTRAL.items():
        value = values.get(key)
        is_missing = value is None and key != "peft_type"
        if not is_missing and value not in neutral:
            raise ModelFileError(
                f"{folder / FILE} has {key} = {str(value)[:80]!r}, which is not offered; train a "
                "plain LoRA of attention, MLPs and experts."
            )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not _is_number(rank) or rank != int(rank) or rank < 1 or not _is_number(alpha):
        raise ModelFileError(
            f"{folder / FILE} has r = {rank!r} and lora_alpha = {alpha!r}; r must be 1 or more, "
            "and both must be numbers."
        )
    patterns = {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        _check_patterns(folder, key, pattern)
    targets = values.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ModelFileError(f"{folder / FILE} has target_parameters = {targets!r}; use names.")
    return LoraConfig(
        rank=int(rank),
        alpha=float(alpha),
        use_rslora=bool(values.get("use_rslora")),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        target_parameters=tuple(targets),
    )


def _check_patterns(folder: Path, key: str, patterns: Any) -> None:
    """Refuse patterns that are no numbers by name, or that could take for ever to match."""
    if not isinstance(patterns, dict) or not all(
        _is_number(v) and v > 0 for v in patterns.values()
    ):
        raise ModelFileError(
            f"{folder / FILE} has {key} = {str(patterns)[:80]}; use an object of numbers above 0."
        )
    for pattern in patterns:
        # A repeated group, or three stars, is exponential or slow; names need neither.
        is_slow = len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{?]", pattern)
        if len(pattern) > MAX_PATTERN_LENGTH or is_slow:
            raise ModelFileError(
                f"{folder / FILE} has {pattern[:80]!r} in {key}; name modules with at most two "
                "repetitions and none of a group."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelFileError(
                f"{folder / FILE} has {pattern!r} in {key}, which is no expression ({error})."
            ) from None


def _find(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that fits a module's name, as peft finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
