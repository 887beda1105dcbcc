"""Routes of a run: every rank records its own rows, and recorded steps can be replayed.

B sequences of a batch, W windows.
"""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..moe.batch import Batch
from ..moe.models.model import Model
from ..moe.routers.routing import Routing
from ..moe.routes.reader import SUFFIX, RouteFile
from ..moe.routes.recorder import Seen, header_of, look_at, rows_of, see_forwards
from ..moe.routes.replay import RouteIndex, replaying
from ..moe.routes.rows import Phase, Routes
from ..moe.routes.writer import RouteWriter, cut_after
from ..parallel.mesh import Mesh
from .objectives.objective import Objective
from .observers.observers import Observer
from .step import StepResult, TrainStep

log = logging.getLogger(__name__)

FOLDER = "routes"


class RouteRecording(Observer):
    """Writes ``RUN_DIR/routes/rank-R.routes``: the rows of this rank, every so many steps.

    A forward is only looked at. Its choices are copied and written when the step is done, so the
    host does not wait for them in between.
    """

    def __init__(
        self,
        objective: Objective[Any],
        decoder: Model,
        train_step: TrainStep,
        run_dir: Path,
        mesh: Mesh,
        resume_step: int,
    ) -> None:
        """Open the file on all ranks; rows of steps after ``resume_step`` are removed.

        Raises :class:`ConfigError` on all ranks if it cannot go on in the files of an earlier
        start.
        """
        config = objective.config
        routes = config.monitor.routes
        assert routes is not None, "the caller asks for it"
        self._every = routes.every
        facts = {"program": "training", "data": objective.data.identity, "seed": config.seed}
        header = header_of(decoder.config, weights=routes.weights, written_by=facts)
        folder = run_dir / FOLDER

        def prepare() -> None:
            folder.mkdir(exist_ok=True)
            paths = sorted(folder.glob(f"*{SUFFIX}"))
            files = [RouteFile(path) for path in paths if path.stat().st_size]
            for file in files:
                if file.header != header:
                    raise ConfigError(
                        f"{file.path} was recorded with other settings or from other data; move it "
                        "away, or put the settings back."
                    )
            for file in files:
                cut_after(file.path, resume_step)

        mesh.on_rank_0(prepare)
        path = folder / f"rank-{mesh.rank}{SUFFIX}"
        self._writer = RouteWriter(path, header, routes.max_bytes, append=True)
        self._numbers = SequenceNumbers(objective)
        self._train_step = train_step
        self._is_due = False
        self._seen: list[tuple[Seen, list[int]]] = []
        train_step.before_forward.append(self._expect)
        self._handle = see_forwards(decoder, self._see)

    def step(self, done: int, result: StepResult, phase_seconds: Mapping[str, float]) -> None:
        """Write the rows of a step, if it is due."""
        if not self._seen:
            return
        seen, self._seen = self._seen, []
        try:
            for forward, sequences in seen:
                phases = [Phase.TRAIN] * len(sequences)
                self._writer.add(rows_of(forward, sequences, phases, done))
            self._writer.flush()
        except OSError:
            self._look_away()
            raise
        if self._writer.is_full:
            self._look_away()
            log.warning(
                "%s has reached monitor.routes.max_bytes; later steps are not recorded.",
                self._writer.path,
            )

    def close(self) -> None:
        """Write the file's end."""
        self._look_away()
        self._writer.close()

    def _expect(self, step: int, windows: range) -> None:
        self._is_due = (step + 1) % self._every == 0
        if self._is_due:
            self._numbers.expect(step, windows)

    def _see(self, batch: Batch, routings: list[Routing]) -> None:
        if self._is_due:
            self._is_due = False  # the next forward may be an evaluation
            self._seen.append((look_at(batch, routings), self._numbers.of(batch)))

    def _look_away(self) -> None:
        self._handle.remove()
        if self._expect in self._train_step.before_forward:
            self._train_step.before_forward.remove(self._expect)
        self._seen = []


@contextmanager
def replaying_steps(
    train_step: TrainStep, decoder: Model, objective: Objective[Any], routes: Routes
) -> Iterator[None]:
    """Replay in the training steps inside the ``with`` block; ``routes`` have their steps.

    The number of ranks may be another than that of the recording. Evaluations inside the block
    route by themselves. Raises :class:`DataError` for rows that were not recorded.
    """
    numbers = SequenceNumbers(objective)
    indices: dict[int, RouteIndex] = {}
    is_next = False

    def expect(step: int, windows: range) -> None:
        nonlocal is_next
        numbers.expect(step, windows)
        is_next = True
        if step not in indices:
            indices.clear()
            indices[step] = RouteIndex(routes.select(routes.steps_N == step + 1))

    def experts_of(batch: Batch) -> Tensor | None:
        nonlocal is_next
        if not is_next:
            return None
        is_next = False
        (index,) = indices.values()
        return index.experts_of(batch, numbers.of(batch))

    train_step.before_forward.append(expect)
    try:
        with replaying(decoder, experts_of):
            yield
    finally:
        train_step.before_forward.remove(expect)


class SequenceNumbers:
    """Numbers the sequences of a step's global batch, the same on any number of ranks.

    A sequence is numbered by the place of its first row: window w begins at
    ``w * Objective.window_length``, whether or not the windows before it are full.
    """

    def __init__(self, objective: Objective[Any]) -> None:
        self._objective = objective
        self._step, self._windows = 0, range(0)

    def expect(self, step: int, windows: range) -> None:
        """Note the windows that the next forward computes."""
        self._step, self._windows = step, windows

    def of(self, batch: Batch) -> list[int]:
        """Return the numbers of the batch's sequences."""
        rows_W = self._objective.window_rows(self._step, self._windows)
        length = self._objective.window_length
        return sequence_numbers(batch.lengths, rows_W, self._windows.start, length)


def sequence_numbers(
    lengths_B: Sequence[int], rows_W: Sequence[int], first_window: int, window_length: int
) -> list[int]:
    """Return the number of each sequence of a batch, whose windows have ``rows_W`` rows."""
    ends_W = list(accumulate(rows_W))
    numbers, start = [], 0
    for length in lengths_B:
        window = bisect_right(ends_W, start)
        within = start - (ends_W[window] - rows_W[window])
        numbers.append((first_window + window) * window_length + within)
        start += length
    return numbers
