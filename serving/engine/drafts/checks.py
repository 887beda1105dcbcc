"""What speculation does not go with."""

from pathlib import Path

import torch

from ....errors import ConfigError
from ....kernels.attention import can_attend_rows
from ....moe.models.decoder import Decoder
from .table import NONE, drafter_named


def check_speculative(
    name: str, record_routes: str | None = None, fallback: Path | None = None
) -> None:
    """Raise :class:`ConfigError` for unknown names, and for what drafted rows would spoil."""
    if drafter_named(name) is None:
        return
    if record_routes is not None:
        raise ConfigError(
            f"speculative is {name!r} and record-routes {record_routes!r}, but drafted tokens that "
            f"are wrong have routes, too; leave record-routes out, or set speculative to {NONE}."
        )
    if fallback is not None:
        raise ConfigError(
            f"speculative is {name!r} and expert-fallback {str(fallback)!r}, but drafted tokens "
            "change which experts are in memory, and so which are computed from copies; leave one "
            "out."
        )


def check_rows_alone(decoder: Decoder) -> None:
    """Raise :class:`ConfigError` where a row's bits depend on how many rows run with it."""
    weight = decoder.norm.weight
    with torch.inference_mode():
        is_alone = weight.dtype == torch.bfloat16 or can_attend_rows((weight, weight))
    if not is_alone:
        raise ConfigError(
            "speculative needs the C++ kernels in fp32, because the digits of torch's products "
            "depend on the other rows; use bf16, or leave speculative out."
        )
