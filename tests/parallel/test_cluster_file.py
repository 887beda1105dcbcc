"""The description of a cluster: units, sections, and one sentence for each slip of the pen."""

from pathlib import Path

import pytest
import yaml
from simulation_cases import CLUSTER, cluster_of

from moeyard.errors import ConfigError
from moeyard.parallel.simulation.cluster import read_cluster, to_yaml
from moeyard.parallel.simulation.curve import at
from moeyard.parallel.simulation.units import parse

SHIPPED = sorted((Path(__file__).parent.parent.parent / "configs" / "clusters").glob("*.yaml"))


def test_units_are_read_as_they_are_written():
    assert parse("400Gbit/s", "rate") == 50e9
    assert parse("3.35 TB/s", "rate") == 3.35e12
    assert parse("80GB", "bytes") == 80e9 and parse("64GiB", "bytes") == 64 * 2**30
    assert parse("15us", "seconds") == pytest.approx(15e-6)
    assert parse("989TFLOP/s", "flops") == 989e12


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_descriptions_can_be_read_and_written(path, tmp_path):
    cluster = read_cluster(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(cluster))
    assert to_yaml(read_cluster(copy)) == to_yaml(cluster)


def test_a_curve_is_straight_over_the_logarithm_and_flat_outside():
    curve = {1: 0.1, 100: 0.5}
    assert at(curve, 10) == pytest.approx(0.3)
    assert at(curve, 0.5) == 0.1 and at(curve, 1e6) == 0.5
    assert at(0.4, 10) == 0.4


@pytest.mark.parametrize(
    "path, value, wanted",
    [
        ("gpu.memory", 80, "gpu.memory: it is 80; write bytes, such as 80GB or 64GiB."),
        ("gpu.memory", "80Gbit/s", "gpu.memory: it is '80Gbit/s'; write bytes"),
        ("inside_node.bandwidth", "450GB", "inside_node.bandwidth: it is '450GB'; write bytes or"),
        ("between_nodes.latency", "20", "between_nodes.latency: it is '20'; write a time"),
        ("gpu.flops.bf16", "989T", "gpu.flops.bf16: it is '989T'; write floating-point"),
        ("gpu.achieved", 1.5, "gpu.achieved: it must be above 0 and at most 1."),
        ("gpu.achieved", "half", "gpu.achieved: it is 'half'; write a share such as 0.5"),
        ("inside_node", None, "inside_node is missing, but gpus_per_node is 8"),
        ("between_nodes", None, "between_nodes is missing, but nodes is 512"),
        ("between_nodes.oversubscription", 2, "but leaf_nodes is missing"),
        ("gpu.memory_bandwith", "1TB/s", "did you mean gpu.memory_bandwidth?"),
        ("gpus_pernode", 8, "did you mean gpus_per_node?"),
        ("gpu.memory_bandwidth", None, "gpu.memory_bandwidth is missing"),
        ("collectives", "mpi", "collectives: it is 'mpi'"),
    ],
)
def test_each_problem_is_one_sentence(tmp_path, path, value, wanted):
    values = yaml.safe_load(yaml.safe_dump(CLUSTER))
    *parents, last = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[last]
    else:
        section[last] = value
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        read_cluster(file)
    said = str(error.value)
    assert wanted in said and "\n" not in said and str(file) in said


def test_a_cluster_of_one_gpu_needs_no_links():
    alone = cluster_of(nodes=1, gpus_per_node=1)
    assert alone.num_gpus == 1
