"""Which channels of its experts each row of a call uses, and what the channels were.

T tokens, K choices, R = T*K routed rows, F expert width, n some routed rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowChannels:
    """Channels of routed rows, for experts that are stored by channel.

    Row ``t * K + k`` is choice k of token t. Channels that no row of an expert uses are not read.
    """

    used_RF: Tensor | None = None
    """bool: whether a row uses a channel; the others count as 0. None = all rows use all."""
    act_RF: Tensor | None = None
    """In x's type, filled by the call: what goes into down. Lines of rows without an expert stay as
    they are. None = it is not wanted."""

    def check(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        """Raise ``ValueError`` for tensors that do not fit a call."""
        for part, wanted in ((self.used_RF, torch.bool), (self.act_RF, dtype)):
            if part is None:
                continue
            fits = part.dtype == wanted and part.is_contiguous()
            if tuple(part.shape) != (num_rows, width) or not fits:
                raise ValueError(
                    f"channels are {tuple(part.shape)} in {part.dtype}; they must be "
                    f"{(num_rows, width)} in {wanted}, and dense."
                )

    def of(self, act_nF: Tensor, routed_n: Tensor) -> Tensor:
        """Keep what the channels of some rows are, and return it with 0 for those not used."""
        if self.used_RF is not None:
            act_nF = torch.where(self.used_RF.index_select(0, routed_n), act_nF, 0)
        if self.act_RF is not None:
            self.act_RF.index_copy_(0, routed_n, act_nF)
        return act_nF
