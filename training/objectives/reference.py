"""What the model that a run starts from gives the answers of preference pairs.

It is computed before the first step, by the forward that training runs, and kept in the run folder.
So it needs no second model in memory, is the same for all ways to train, and a resumed run has the
reference that it began with.

P pairs of a data set, B pairs of a batch.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, ConfigError, Stopped
from ...files import replaced
from ...parallel.mesh import Mesh
from ..stop import StopRequest
from ..work import LongWork

FILE = "reference.safetensors"
SAVE_EVERY_S = 60.0
"""Seconds of computing that a crash may lose."""

Score = Callable[[list[int]], Tensor]
"""Returns fp64 ``[B, 2]`` of some pairs, perhaps none: what the model gives both answers."""


class Reference:
    """Log-probabilities of both answers of each pair, by the name of the data set."""

    def __init__(self, path: Path, made_from: dict[str, Any], sizes: dict[str, int]) -> None:
        """Read ``path``, if it is there; ``sizes`` are the numbers of pairs.

        ``made_from`` are JSON values. Raises :class:`ConfigError` if one is not that of the file. A
        value of None is not compared: the run does not know it any more.
        """
        self._path, self._made_from = path, made_from
        self.log_probs: dict[str, Tensor] = {
            name: torch.full((size, 2), torch.nan, dtype=torch.float64)
            for name, size in sizes.items()
        }
        """fp64 ``[P, 2]`` of each data set, chosen and rejected; NaN where not known yet."""
        if path.is_file():
            self._read()

    def missing(self, name: str, pairs: list[int]) -> list[int]:
        """Return those of ``pairs`` that are not known yet."""
        unknown_P = self.log_probs[name].isnan().any(dim=1)
        return [pair for pair in pairs if unknown_P[pair]]

    def compute(
        self,
        name: str,
        pairs: list[int],
        score: Score,
        per_rank: int,
        mesh: Mesh,
        stop: StopRequest,
    ) -> None:
        """Fill in what is missing of ``pairs``; each rank scores ``per_rank`` of them at a time.

        What is known is saved once a minute and at the end. Raises :class:`Stopped` on all ranks if
        one is asked to stop.
        """
        missing = self.missing(name, pairs)
        at_once, first = per_rank * mesh.dp_size, mesh.dp_rank * per_rank
        saved = time.monotonic()
        with LongWork("computing the reference", StopRequest(), len(missing)) as work:
            for start in range(0, len(missing), at_once):
                part = missing[start : start + at_once]
                own = range(len(part))[first : first + per_rank]
                sums_B2 = torch.zeros(len(part), 2, dtype=torch.float64)
                sums_B2[own.start : own.stop] = score([part[place] for place in own])
                asked = (stop.signal_name is not None, time.monotonic() - saved > SAVE_EVERY_S)
                sums = mesh.sum(torch.cat([sums_B2, torch.tensor([asked], dtype=torch.float64)]))
                self.log_probs[name][part] = sums[:-1]
                must_stop, must_save = (sums[-1] > 0).tolist()
                is_last = start + at_once >= len(missing)
                if must_save or must_stop or is_last:
                    mesh.on_rank_0(self._save)
                    saved = time.monotonic()
                if must_stop and not is_last:
                    raise Stopped("stopped while the reference was computed; start again to go on.")
                work.advance(len(part))

    def _read(self) -> None:
        with safe_open(self._path, "pt") as file:
            before = json.loads((file.metadata() or {})["made_from"])
            for name, value in self._made_from.items():
                if value is not None and before.get(name) != value:
                    raise ConfigError(
                        f"{self._path} has the reference of a run with another {name}; put it "
                        "back, use a new run_dir, or remove the file to compute the reference "
                        "again."
                    )
            self._made_from = before
            self.log_probs = {name: file.get_tensor(name) for name in self.log_probs}

    def _save(self) -> None:
        metadata = {"made_from": json.dumps(self._made_from)}
        try:
            with replaced(self._path) as unfinished:
                save_file(self.log_probs, unfinished, metadata=metadata)
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written ({error.strerror}); make room, then start again."
            ) from None
