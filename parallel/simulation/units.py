"""Quantities as people write them: ``400Gbit/s``, ``80GB``, ``15us``, ``989TFLOP/s``."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Kind = Literal["bytes", "rate", "seconds", "flops"]

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
UNITS: dict[Kind, dict[str, float]] = {
    "bytes": {f"{p}B": f for p, f in (PREFIXES | BINARY).items()},
    "rate": {f"{p}B/s": f for p, f in (PREFIXES | BINARY).items()}
    | {f"{p}bit/s": f / 8 for p, f in PREFIXES.items()},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "flops": {f"{p}FLOP/s": f for p, f in PREFIXES.items()},
}
EXAMPLES: dict[Kind, str] = {
    "bytes": "bytes, such as 80GB or 64GiB",
    "rate": "bytes or bits a second, such as 50GB/s or 400Gbit/s",
    "seconds": "a time, such as 15us or 2ms",
    "flops": "floating-point operations a second, such as 989TFLOP/s",
}
SMALLER = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
WRITTEN: dict[Kind, str] = {"bytes": "B", "rate": "B/s", "seconds": "s", "flops": "FLOP/s"}


def parse(value: Any, kind: Kind) -> float:
    """Return a quantity in bytes, bytes/s, seconds or FLOP/s.

    Raises ``ValueError`` with a sentence for other units, and for numbers without one.
    """
    text = value if isinstance(value, str) else repr(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    units = UNITS[kind]
    if found is None or found[2] not in units:
        raise ValueError(f"it is {value!r}; write {EXAMPLES[kind]}.")
    amount = float(found[1]) * units[found[2]]
    if not math.isfinite(amount):
        raise ValueError(f"it is {value!r}, which is too large; write {EXAMPLES[kind]}.")
    return amount


def written(amount: float, kind: Kind) -> str:
    """Return a quantity as :func:`parse` reads it, with the prefix that suits it."""
    prefixes = (
        SMALLER if kind == "seconds" else {p: PREFIXES[p] for p in ("P", "T", "G", "M", "k", "")}
    )
    least = list(prefixes)[-1]
    prefix = next((p for p, factor in prefixes.items() if amount >= factor), least)
    return f"{amount / prefixes[prefix]:.6g}{prefix}{WRITTEN[kind]}"


def _parser(kind: Kind) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value, kind))


Bytes = Annotated[float, _parser("bytes")]
Rate = Annotated[float, _parser("rate")]
"""Bytes a second."""
Seconds = Annotated[float, _parser("seconds")]
Flops = Annotated[float, _parser("flops")]
"""Floating-point operations a second; a multiplication with its addition is two."""
