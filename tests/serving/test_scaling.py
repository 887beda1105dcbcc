"""How many replicas there should be, by the answers that run or wait."""

import io
import pickle
from types import SimpleNamespace

import pytest

from moeyard.configuration import validate_config
from moeyard.errors import ConfigError, MoeyardError
from moeyard.serving.app import build, places_metadata
from moeyard.serving.replicas.places_router import CROWD, ORIGINS, PLACES
from moeyard.serving.replicas.scaling import ANSWERS, replicas_for_answers, scaling
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server


def wanted(answers: list[float], batch=8, target=1) -> int:
    context = SimpleNamespace(
        aggregated_metrics={ANSWERS: dict(enumerate(answers))} if answers else {},
        target_num_replicas=target,
        config=SimpleNamespace(target_ongoing_requests=batch),
    )
    return replicas_for_answers(context)[0]


@pytest.mark.parametrize(
    ("answers", "replicas"),
    [([0], 1), ([8], 1), ([8.5], 2), ([72], 9), ([4, 4], 1), ([8, 8, 1], 3), ([0, 0], 1)],
)
def test_there_is_one_replica_for_each_full_batch(answers, replicas):
    assert wanted(answers) == replicas


def test_without_reports_nothing_changes():
    assert wanted([], target=3) == 3


def test_the_policy_travels_as_a_copy_that_needs_nothing_of_this_package():
    found = set()

    class Watched(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(module)
            return super().find_class(module, name)

    config = scaling(ServeArgs(model="folder", max_replicas=3))
    policy = Watched(io.BytesIO(config.policy.get_serialized_policy_def())).load()
    assert found and not any(module.startswith("moeyard") for module in found)
    assert policy is not replicas_for_answers and policy.__name__ == "replicas_for_answers"
    config = SimpleNamespace(target_ongoing_requests=8)
    context = SimpleNamespace(aggregated_metrics={"answers": {1: 20}}, config=config)
    assert policy(context) == (3, {})


def test_ray_gets_the_bounds_and_the_batch(model_folder):
    values = {"model": str(model_folder), "num_replicas": 2, "max_replicas": 5, "max_num_seqs": 3}
    config = build(values | {"downscale_delay": 7})._bound_deployment._deployment_config
    found = config.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (2, 5, 3)
    assert found.downscale_delay_s == 7


def test_without_a_greatest_number_nothing_scales(model_folder):
    config = build({"model": str(model_folder)})._bound_deployment._deployment_config
    assert config.autoscaling_config is None


@pytest.mark.parametrize("wish", [False, True])
def test_the_router_follows_beginnings_where_it_is_asked_to(model_folder, wish):
    values = {"model": str(model_folder), "prefix_routing": wish, "max_num_seqs": 6}
    config = build(values)._bound_deployment._deployment_config.request_router_config
    assert config.request_router_class.endswith("PlacesRouter")
    said = places_metadata(validate_config(ServeArgs, values), 9)
    assert said == {PLACES: 9, CROWD: 3 if wish else None, ORIGINS: []}


def test_fewer_replicas_than_the_least_are_refused():
    with pytest.raises(MoeyardError, match="max_replicas is 2, but there are at least 3"):
        validate_config(ServeArgs, {"model": "folder", "num_replicas": 3, "max_replicas": 2})


def test_memory_and_threads_are_those_of_the_most_replicas(model_folder, monkeypatch):
    from moeyard.serving import server as module

    asked = {}
    monkeypatch.setattr(module, "check_memory", lambda *args: asked.update(replicas=args[3]))
    args = ServeArgs(model=str(model_folder), max_replicas=3)
    module.check_model(args, runs_here=True)
    assert asked["replicas"] == 3


def test_replicas_report_answers_and_not_requests(model_folder):
    server = Server(ServeArgs(model=str(model_folder)))
    try:
        assert server.admission.num_held == 0
        with server.admission.places(3), server.admission.places(1):
            assert (server.admission.num_held, server.admission.num_open) == (4, 2)
        assert server.admission.num_held == 0
    finally:
        server.close()


def test_updates_of_adapters_need_one_replica_at_most(model_folder):
    values = {"model": str(model_folder), "max_replicas": 2, "allow_lora_updates": True}
    with pytest.raises(ConfigError, match="there are 2 replicas"):
        from moeyard.serving.server import check_model

        check_model(ServeArgs(**values, api_key="x"))
