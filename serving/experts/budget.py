"""Memory budgets as people write them: ``2GiB``, ``500MB``, ``25%``."""

import re

from ...errors import ConfigError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20}
UNITS |= {"gib": 1 << 30, "tib": 1 << 40, "tb": 10**12}


def parse_budget(text: str, whole_bytes: int) -> int:
    """Return bytes; a percentage is taken of ``whole_bytes``."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(%|[a-zA-Z]+)\s*", text)
    unit = match.group(2).lower() if match else ""
    if match is None or (unit != "%" and unit not in UNITS):
        raise ConfigError(f"expert-memory is {text!r}; write a size like 2GiB or a share like 25%.")
    amount = float(match.group(1))
    if unit == "%":
        if not 0 < amount <= 100:
            raise ConfigError(
                f"expert-memory is {text!r}; a share must be above 0% and up to 100%."
            )
        return int(whole_bytes * amount / 100)
    return int(amount * UNITS[unit])
