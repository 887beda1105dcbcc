"""``parallel.chunks: auto``: cut layers into as many chunks as links and experts ask for."""

from typing import Any

from ..dtypes import torch_dtype
from ..moe.layer import MoELayer
from ..moe.models.decoder import Decoder
from ..parallel.experts.pipelined import Degrees, PipelinedPath
from ..parallel.mesh import Mesh
from ..parallel.planning.comparison import Comparison, record_of
from ..parallel.planning.cost_model import CostModel
from ..parallel.planning.even_work import even_work
from ..parallel.planning.pipeline import DEGREES, best_degrees
from ..parallel.profiling.layer import LayerShape, measure_beside, measure_layer
from .config import RunConfig
from .device import device


class LayerSchedule:
    """Measures at the start, and every ``parallel.profile_every`` steps; all ranks together.

    All MoE layers of a model have one shape and share a path, so the first one stands for all. Its
    tokens are expected to choose their experts evenly.
    """

    def __init__(
        self, config: RunConfig, decoder: Decoder, mesh: Mesh, pipeline: PipelinedPath
    ) -> None:
        moe = decoder.config.moe
        _, layer = decoder.moe_layers()[0]
        assert moe is not None, "a path to experts is the path of an MoE model"
        self._path = pipeline
        self._layer: MoELayer = layer
        self._mesh = mesh
        self._every = config.parallel.profile_every
        self._is_sharded = config.parallel.dense == "fsdp"
        """Whether FSDP gathers a shared expert for its layer's forward only: it cannot be timed."""
        train = config.train
        rows = train.batch_sequences // (train.accumulation * mesh.world_size)
        self._shape = LayerShape(
            tokens=rows * train.sequence_length,
            num_experts=moe.num_experts,
            num_choices=layer.gate.k,
            d_model=layer.d_model,
            dtype=torch_dtype(train.precision),
        )
        self._comparison = Comparison()
        self._model: CostModel
        self._path.observe = self._compare
        self._choose()

    def after_step(self, done: int) -> None:
        """Measure again if it is time."""
        if self._every is not None and done % self._every == 0:
            self._choose()

    def record(self) -> dict[str, Any]:
        """Return the chosen chunks, how well lines fit, and predicted against measured seconds.

        The seconds are of a layer, and means since the last call. Those of shared experts count,
        and those of routers do not.
        """
        degrees = self._path.degrees
        chosen = {"chunks": degrees.forward, "backward_chunks": degrees.backward}
        return chosen | record_of(self._model, self._comparison)

    def _choose(self) -> None:
        shape, levels = self._shape, self._path.levels
        here = device()
        shared = None if self._is_sharded else self._layer.shared_expert
        self._model = measure_layer(shape, levels, self._layer.experts, self._mesh, here)
        work = even_work(
            shape.tokens,
            shape.num_experts,
            shape.num_choices,
            shape.d_model * shape.dtype.itemsize,
            ranks=self._mesh.ep_size,
            ranks_per_node=levels[1].size if len(levels) > 1 else 1,
            to_all=levels[0].to_all,
            beside_s=measure_beside(shape, shared, self._mesh, here),
        )
        candidates = [degree for degree in DEGREES if degree <= shape.tokens]
        best = best_degrees(self._model, work, candidates)
        self._expected_s = {"forward": best.forward_s, "backward": best.backward_s}
        self._path.degrees = Degrees(best.forward, best.backward)

    def _compare(self, phase: str, seconds: float) -> None:
        self._comparison.add(phase, self._expected_s[phase], seconds)
