"""The actor that holds a node's copies, in a real Ray: kills, losses, two nodes.

Slow: each Ray takes seconds to start. tests/serving/test_host_tier.py has the tier without Ray.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from moeyard.errors import ConfigError
from moeyard.serving.experts.tiers import node_link
from moeyard.serving.experts.tiers.node_cache import NAMESPACE, name_of
from moeyard.serving.experts.tiers.node_link import NodeLink, check_object_store
from moeyard.serving.experts.tiers.shared_memory import SPARE_BYTES

pytestmark = [pytest.mark.server, pytest.mark.slow]
EXPERT = 1 << 20
BUDGET = 8 * EXPERT
STORE = BUDGET + SPARE_BYTES
NODE = {"num_cpus": 8, "object_store_memory": STORE}


def expert(number):
    return np.random.default_rng(number).integers(0, 256, EXPERT, dtype=np.uint8)


class Replica:
    """A process with a link, as a replica of Ray Serve is."""

    def __init__(self, model):
        self.link = NodeLink(model, BUDGET)

    def bring(self, number):
        return self.link.bring((0, number), expert(number))

    def has(self, number):
        """Say whether the copy is there, byte for byte."""
        found = self.link.find((0, number))
        return found is not None and np.array_equal(found, expert(number))

    def has_elsewhere(self, number):
        found = self.link.find_elsewhere((0, number))
        return found is not None and np.array_equal(found, expert(number))

    def keeps_view(self, number):
        """Hold a view of the copy while others drop it, and say whether it stays the same."""
        found = self.link.find((0, number))
        self.link.drop((0, number))
        assert self.link.find((0, number)) is None
        for other in range(100, 120):
            self.link.bring((0, other), expert(other))
        return np.array_equal(found, expert(number))

    def sees_others(self):
        return self.link.has_other_nodes

    def pid(self):
        return os.getpid()

    def close(self):
        self.link.close()


@pytest.fixture(scope="module")
def cluster():
    """One node, to which tests may add others."""
    with pytest.MonkeyPatch.context() as patch:
        # All of Ray's ports on the loopback, see serving/cluster/own_ray.py; Ray is imported.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import this file
        started = Cluster(initialize_head=True, head_node_args=NODE)
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


def start_replica(model, **options):
    return ray.remote(Replica).options(num_cpus=0, **options).remote(model)


def ask(reference):
    return ray.get(reference, timeout=60)


def cache_of(model, node=None):
    node = node or ray.get_runtime_context().get_node_id()
    return ray.get_actor(name_of(model, node), namespace=NAMESPACE)


def until(holds, seconds=40):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pid_of_cache(model):
    return ask(cache_of(model).pid.remote())


def test_two_replicas_share_one_copy_and_it_outlives_the_one_that_read_it(cluster):
    first, second = start_replica("share"), start_replica("share")
    assert ask(first.bring.remote(1)) and not ask(second.bring.remote(1))
    assert ask(second.has.remote(1)) and not ask(second.has.remote(2))
    os.kill(ask(first.pid.remote()), signal.SIGKILL)
    time.sleep(1)
    assert ask(second.has.remote(1))
    assert ask(cache_of("share").counts.remote())["num_bytes"] == EXPERT


def test_replicas_that_read_the_same_at_the_same_time_leave_one_copy(cluster):
    replicas = [start_replica("race") for _ in range(2)]
    kept = [replica.bring.remote(number) for number in range(6) for replica in replicas]
    answers = [ask(reference) for reference in kept]
    assert sum(answers) <= 6
    counts = ask(cache_of("race").counts.remote())
    assert counts["copies"] == sum(answers) and counts["num_bytes"] == sum(answers) * EXPERT


def test_shared_memory_stays_within_the_budget_and_is_not_spilled(cluster):
    replica = start_replica("budget")
    free = ray.available_resources()["object_store_memory"]
    for number in range(40):
        assert ask(replica.bring.remote(number))
    counts = ask(cache_of("budget").counts.remote())
    assert (counts["copies"], counts["evictions"]) == (8, 32)
    assert [number for number in range(40) if ask(replica.has.remote(number))] == [*range(32, 40)]
    until(lambda: free - ray.available_resources()["object_store_memory"] < BUDGET + 5 * EXPERT)


def test_a_view_stays_valid_when_its_copy_is_put_out(cluster):
    replica = start_replica("view")
    assert ask(replica.bring.remote(3)) and ask(replica.keeps_view.remote(3))


def test_a_killed_cache_means_misses_and_a_new_one_takes_its_place(cluster):
    replica = start_replica("killed")
    assert ask(replica.bring.remote(1)) and ask(replica.has.remote(1))
    os.kill(pid_of_cache("killed"), signal.SIGKILL)
    started = time.monotonic()
    assert not ask(replica.has.remote(1)) and not ask(replica.bring.remote(2))
    assert time.monotonic() - started < 10
    until(lambda: ask(replica.bring.remote(2)))
    assert ask(replica.has.remote(2)) and not ask(replica.has.remote(1))


def test_a_stopped_cache_costs_a_bounded_wait_once(cluster):
    replica = start_replica("stopped")
    assert ask(replica.bring.remote(1))
    pid = pid_of_cache("stopped")
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert not any(ask(replica.has.remote(1)) for _ in range(5))
        assert time.monotonic() - started < node_link.ANSWER_TIMEOUT_S + 2
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: ask(replica.has.remote(1)))


def is_gone(model):
    try:
        cache_of(model)
    except ValueError:
        return True
    return False


def test_the_cache_ends_with_its_replicas_however_they_end(cluster):
    polite, killed = start_replica("polite"), start_replica("killed_too")
    assert ask(polite.bring.remote(1)) and ask(killed.bring.remote(1))
    ask(polite.close.remote())
    os.kill(ask(killed.pid.remote()), signal.SIGKILL)
    until(lambda: is_gone("polite"), 30)
    until(lambda: is_gone("killed_too"), 60)


def test_a_store_that_is_too_small_is_one_sentence(cluster):
    with pytest.raises(ConfigError, match=r"host-memory is \d+ bytes, but Ray's object store has"):
        check_object_store(STORE)
    check_object_store(BUDGET)


def test_another_nodes_memory_is_a_source_and_its_death_a_miss(cluster, monkeypatch):
    node = cluster.add_node(**NODE, resources={"far": 1})
    far = start_replica("nodes", resources={"far": 0.1})
    assert ask(far.bring.remote(1)) and ask(far.bring.remote(2))
    here = ray.get_runtime_context().get_node_id()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    near = start_replica(
        "nodes", scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
    )
    until(lambda: ask(near.sees_others.remote()), 60)
    assert not ask(near.has.remote(1)) and ask(near.has_elsewhere.remote(1))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: [ask(near.has_elsewhere.remote(2)) for _ in range(3)])
        cluster.remove_node(node)
        answer.result(90)
    until(lambda: not ask(near.has_elsewhere.remote(2)), 60)
    assert ask(near.bring.remote(2)) and ask(near.has.remote(2))
