"""Numbers that a caller gives with each row, such as its task. T tokens."""

import torch
from torch import Tensor

from ...errors import ConfigError


def checked(values_T: Tensor, valid_T: Tensor | None, name: str, highest: float) -> Tensor:
    """Return the numbers, 0 in rows that are not valid.

    Raises :class:`ConfigError` for numbers outside 0 to ``highest``; on the CPU only, because a
    GPU's would have to be waited for.
    """
    if valid_T is not None:
        values_T = torch.where(valid_T, values_T, 0)
    if torch.compiler.is_compiling() or not values_T.is_cpu or not len(values_T):
        return values_T
    low, high = (bound.item() for bound in values_T.aminmax())
    if not 0 <= low <= high <= highest:
        wrong = high if low >= 0 else low
        raise ConfigError(f"{name} has {wrong}; use numbers from 0 to {highest}.")
    return values_T
