"""What every kind of data says of itself: the rows by which MoE layers are timed, its measures."""

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


@pytest.fixture(scope="module", params=OTHERS)
def run(request, tmp_path_factory, config_file):
    folder, other = tmp_path_factory.mktemp(request.param), OTHERS[request.param]
    section = other.write(folder)
    section.pop("alignment", None)  # its rows do not count
    values = [f"model={json.dumps(other.model)}", f"data={json.dumps(section)}"]
    return trainer(config_file, folder / "run", *values, *other.overrides)


def rows_of_layers(run) -> dict[int, int]:
    """Return the rows that each MoE layer computes for the batches of the measured steps."""
    rows = Counter()
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, index=index: rows.update({index: len(given[0])})
        )
        for index, layer in run.decoder.moe_layers()
    ]
    module = run.objective.module(run.decoder)
    with torch.no_grad():
        for step in range(MEASURED_STEPS):
            module(run.objective.batch(step, range(BATCH), torch.device("cpu")))
    for hook in hooks:
        hook.remove()
    return rows


def test_mean_rows_are_those_that_moe_layers_compute(run):
    rows = rows_of_layers(run)
    # The first layer reads sources where there are any, and the last one targets.
    mean = (rows[min(rows)] + rows[max(rows)]) // (2 * MEASURED_STEPS * BATCH)
    assert run.objective.mean_rows == mean > 1
    shape = layer_shape(run._config, run.decoder, Mesh(), run.objective.mean_rows)
    assert shape.tokens == BATCH * mean


def test_data_sections_name_what_evaluations_measure(run):
    section = run._config.data
    found = run.objective.evaluate(run._loss, Mesh()).metrics.keys() - {"eval_loss"}
    if section.format == "images":  # tasks have names of their own
        assert not section.measures and all(name.count("_") == 2 for name in found)
    else:
        assert found == section.measures.keys()
