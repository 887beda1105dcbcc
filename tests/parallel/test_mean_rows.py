"""The rows by which MoE layers are timed are those that they compute, for every kind of model."""

import json
from collections import Counter

import pytest
import torch
from other_models import OTHERS

from moeyard.parallel.mesh import Mesh
from moeyard.training.layer_shape import layer_shape
from moeyard.training.objectives.objective import MEASURED_STEPS

from small_trainer import trainer

BATCH = 8


def rows_of_layers(run) -> dict[int, int]:
    """Return the rows that each MoE layer computes for the batches of the measured steps."""
    rows = Counter()
    for index, layer in run.decoder.moe_layers():
        layer.register_forward_pre_hook(
            lambda _, given, index=index: rows.update({index: len(given[0])})
        )
    module = run.objective.module(run.decoder)
    with torch.no_grad():
        for step in range(MEASURED_STEPS):
            module(run.objective.batch(step, range(BATCH), torch.device("cpu")))
    return rows


@pytest.mark.parametrize("kind", OTHERS)
def test_mean_rows_are_those_that_moe_layers_compute(kind, tmp_path, config_file):
    section = OTHERS[kind].write(tmp_path)
    section.pop("alignment", None)  # its rows do not count
    values = [f"model={json.dumps(OTHERS[kind].model)}", f"data={json.dumps(section)}"]
    run = trainer(config_file, tmp_path / "run", *values, *OTHERS[kind].overrides)
    rows = rows_of_layers(run)
    # The first layer reads sources where there are any, and the last one targets.
    mean = (rows[min(rows)] + rows[max(rows)]) // (2 * MEASURED_STEPS * BATCH)
    assert run.objective.mean_rows == mean > 1
    shape = layer_shape(run._config, run.decoder, Mesh(), run.objective.mean_rows)
    assert shape.tokens == BATCH * mean
