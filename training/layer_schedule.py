"""``parallel.chunks: auto``: rows travel in as many chunks as links and experts ask for.

The cost model names the ways that should be fastest. They take turns in the first steps, and the
one that is fastest stays.
"""

from collections.abc import Mapping
from typing import Any

from ..moe.layer import MoELayer
from ..moe.models.model import Model
from ..parallel.experts.materialized_path import MaterializedPath
from ..parallel.experts.open_path import PathKind
from ..parallel.experts.pipelined import Degrees, PipelinedPath
from ..parallel.experts.stopwatch import Elapsed
from ..parallel.mesh import Mesh
from ..parallel.planning.comparison import Comparison, record_of
from ..parallel.planning.trials import Trials
from ..parallel.profiling.candidates import Candidate, find_candidates
from ..parallel.profiling.layer import measure_beside
from .config import RunConfig
from .device import device
from .layer_shape import layer_shape


class LayerSchedule:
    """Measures at the start, and every ``parallel.profile_every`` steps; all ranks together.

    ``paths`` are those to choose from. All MoE layers of a model have one shape and share a path,
    so the first one stands for all. ``rows_per_window`` is :attr:`.Objective.mean_rows`.
    """

    def __init__(
        self,
        config: RunConfig,
        decoder: Model,
        mesh: Mesh,
        paths: Mapping[PathKind, PipelinedPath],
        rows_per_window: int,
    ) -> None:
        assert paths, "there is nothing to choose from"
        self._paths, self._mesh = paths, mesh
        self._layers: list[MoELayer] = [layer for _, layer in decoder.moe_layers()]
        self._every = config.parallel.profile_every
        self._is_sharded = config.parallel.dense == "fsdp"
        """Whether FSDP gathers a shared expert for its layer's forward only: it cannot be timed."""
        self._shape = layer_shape(config, decoder, mesh, rows_per_window)
        self._comparison = Comparison()
        self._observed: list[tuple[str, Elapsed]] = []
        """Phases of the step's MoE layers that are not yet compared, with their seconds."""
        self._step_s = 0.0
        """Seconds of the step's MoE layers that are."""
        for path in paths.values():
            path.observe = self._observe
        self._begin()

    def after_step(self, done: int) -> None:
        """Go on with the next way, or measure again if it is time."""
        self._compare()
        self._trials.note(self._step_s)
        self._step_s = 0.0
        if self._every is not None and done % self._every == 0:
            self._begin()
        else:
            self._use(self._trials.current)

    def record(self) -> dict[str, Any]:
        """Return the way of this step, how well lines fit, and predicted against measured seconds.

        ``is_chosen`` is false while others are tried as well. The seconds are of a layer, and means
        since the last call. Those of shared experts count, and those of routers do not.
        """
        self._compare()
        now = self._now
        way = {
            "path": now.kind,
            "chunks": now.degrees.forward,
            "backward_chunks": now.degrees.backward,
            "is_chosen": self._trials.best is not None,
        }
        return way | record_of(now.model, self._comparison)

    def _begin(self) -> None:
        """Measure, and begin to try the best candidates."""
        layer = self._layers[0]
        shared = None if self._is_sharded else layer.shared_expert
        beside_s = measure_beside(self._shape, shared, self._mesh, device())
        model = (self._shape, layer.experts, self._mesh, device())
        self._trials = Trials(find_candidates(self._paths, *model, beside_s), self._mesh.largest)
        self._use(self._trials.current)

    def _use(self, candidate: Candidate) -> None:
        self._now, path = candidate, candidate.path
        path.degrees = Degrees(candidate.degrees.forward, candidate.degrees.backward)
        for layer in self._layers:
            if isinstance(layer.path, MaterializedPath):
                layer.path.pipeline = path
            else:
                layer.path = path

    def _observe(self, phase: str, elapsed: Elapsed) -> None:
        self._observed.append((phase, elapsed))

    def _compare(self) -> None:
        """Compare the phases of the step with what the cost model predicted."""
        degrees = self._now.degrees
        for phase, elapsed in self._observed:
            seconds = elapsed()
            self._step_s += seconds
            expected_s = degrees.forward_s if phase == "forward" else degrees.backward_s
            self._comparison.add(phase, expected_s, seconds)
        self._observed.clear()
