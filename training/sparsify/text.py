"""The text of ``moeyard sparsify``: windows to train on, and held-out ones.

B windows, L tokens each.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...moe.models.initialize import generator_of
from .settings import Settings

HELD_OUT = 0.1
"""Share of the tokens, at the end of the text, that nothing is trained on."""


class Text:
    """The tokens of a text; the windows of a step depend on the seed and the step alone."""

    def __init__(self, path: Path, text: str, tokenizer: Any, settings: Settings) -> None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        window = settings.length + 1
        held_out = int(HELD_OUT * len(ids))
        if held_out < window:
            needed = int(window / HELD_OUT) + 1
            raise DataError(
                f"--data {str(path)!r} has {len(ids)} tokens, but a tenth of it, which is held "
                f"out, must fill a window of {window}; give {needed} tokens or more, or a smaller "
                "--length."
            )
        ids_N = torch.tensor(ids, dtype=torch.int64)
        self._train_N, self._held_out_N = ids_N[:-held_out], ids_N[-held_out:]
        self._settings = settings

    def windows(self, phase: str, step: int) -> Tensor:
        """Return the windows of a step, int64 ``[B, L + 1]``."""
        settings = self._settings
        places = len(self._train_N) - settings.length
        generator = generator_of(f"{settings.seed}/{phase}/{step}")
        starts_B = torch.randint(places, (settings.batch,), generator=generator)
        return self._train_N[starts_B.unsqueeze(1) + torch.arange(settings.length + 1)]

    def held_out(self) -> list[Tensor]:
        """Return the held-out windows in batches, int64 ``[B, L + 1]``; no target is twice."""
        length, most = self._settings.length, self._settings.eval_windows
        last = len(self._held_out_N) - 1 - length
        count = min(most, (len(self._held_out_N) - 1) // length)
        starts_W = torch.linspace(0, last, count, dtype=torch.float64).long()
        windows = self._held_out_N[starts_W.unsqueeze(1) + torch.arange(length + 1)]
        return list(windows.split(self._settings.batch))
