"""What the ranks of a run measure: an MoE layer of its model, and the rows of a micro-batch."""

from ..dtypes import torch_dtype
from ..moe.models.model import Model
from ..parallel.mesh import Mesh
from ..parallel.profiling.layer import LayerShape
from .config import RunConfig


def layer_shape(config: RunConfig, decoder: Model, mesh: Mesh, rows_per_window: int) -> LayerShape:
    """Return the shape of the first MoE layer, which stands for all: they have one shape.

    ``rows_per_window`` is :attr:`.Objective.mean_rows`.
    """
    moe, train = decoder.config.moe, config.train
    assert moe is not None, "a model without experts"
    _, layer = decoder.moe_layers()[0]
    windows = train.batch_sequences // (train.accumulation * mesh.dp_size)
    return LayerShape(
        tokens=windows * rows_per_window,
        num_experts=moe.num_experts,
        num_choices=layer.gate.k,
        d_model=layer.d_model,
        dtype=torch_dtype(train.precision),
    )
