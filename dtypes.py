"""The names of number types, in one table. Users may give the short or the long one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
"""torch's name by the short one. Run folders have the short one, ``config.json`` the long one."""
_SHORT_NAMES = {long: short for short, long in LONG_NAMES.items()}


def short_name(given: Any) -> Any:
    """Return ``bf16`` for ``bfloat16``, ``torch.bfloat16`` and ``bf16``; other values unchanged.

    Its caller says which names it takes.
    """
    name = str(given).removeprefix("torch.")
    if name in LONG_NAMES:
        return name
    return _SHORT_NAMES.get(name, given)


def spellings(names: tuple[str, ...]) -> str:
    """Return short names with their long ones, for a help text or an error."""
    both = {short: f"{short} ({long})" for short, long in LONG_NAMES.items()}
    return ", ".join(both.get(name, name) for name in names)


def torch_dtype(name: str) -> "torch.dtype":
    """Return torch's type of a short name. torch is imported only here."""
    import torch

    found: torch.dtype = getattr(torch, LONG_NAMES[name])
    return found
