"""Shipped dashboards, alerts and provisioning: whole, and about metrics that exist."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.engine.drafts.metrics import DraftMetrics
from moeyard.serving.engine.metrics import EngineMetrics
from moeyard.serving.experts.opening import open_store
from moeyard.training.observers.prometheus import PrometheusPort
from moeyard.training.phases import PHASES
from moeyard.training.read_config import read_run_config
from moeyard.training.step import StepResult

from launch import free_port

ROOT = Path(__file__).parent.parent.parent
DASHBOARDS = sorted((ROOT / "configs" / "grafana" / "dashboards").glob("*.json"))
SOURCE = ROOT / "configs/grafana/provisioning/datasources/prometheus.yml"
ALERTS = ROOT / "configs" / "prometheus" / "alerts.yml"

TIMES = {"predicted_s": 1.0, "measured_s": 1.0, "relative_error": 0.0}
SCHEDULE = {"chunks": 4, "backward_chunks": 2, "r2": {"gather": 1.0}, "phases": {"forward": TIMES}}
COPIES = {"number": 3, "moved": 0, "share_without": 1.5, "share": 1.1}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def panels(dashboard) -> list[dict]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(path) -> list[str]:
    board = json.loads(path.read_text())
    asked = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    return asked + [variable["query"]["query"] for variable in board["templating"]["list"]]


def names_in(query) -> set[str]:
    return set(re.findall(r"\b(?:moeyard|process)_[a-z0-9_]+", query))


def names_of(text) -> set[str]:
    return {
        family.name + suffix
        for family in text_string_to_metric_families(text)
        for suffix in SUFFIXES.get(family.type, ())
    }


@pytest.fixture(scope="module")
def exported(config_file, model_folder) -> set[str]:
    """Names of a training run's port and of a server that offloads."""
    overrides = [f"monitor.prometheus_port={free_port()}"]
    config = read_run_config(config_file, overrides)
    port = PrometheusPort(config)
    counts_LE = torch.ones(2, 4, dtype=torch.int64)
    port.step(
        1,
        StepResult(1.0, 0.0, 0.0, 1.0, 0.1, counts_LE, (0,) * len(counts_LE), False),
        dict.fromkeys(PHASES, 1.0),
    )
    port.record({"tokens_per_s": 1.0, "eval_loss": 1.0, "schedule": SCHEDULE, "copies": COPIES})
    found = names_of(generate_latest(port.registry).decode())
    port.close()
    folder = ModelFolder(model_folder)
    store = open_store(folder, torch.float32, 1 << 20)
    serving = EngineMetrics(folder.config, store)
    DraftMetrics(serving.registry)  # of servers with --speculative
    return found | names_of(serving.render().decode())


@pytest.mark.parametrize("path", [*DASHBOARDS, ALERTS], ids=lambda path: path.name)
def test_every_query_asks_for_metrics_that_exist(path, exported):
    if path == ALERTS:
        groups = yaml.safe_load(path.read_text())["groups"]
        asked = [rule["expr"] for group in groups for rule in group["rules"]]
    else:
        asked = queries(path)
    for query in asked:
        assert names_in(query) or "up{" in query, query
        assert names_in(query) <= exported, query


def test_every_exported_metric_of_training_is_on_its_dashboard(exported):
    shown = set().union(*map(names_in, queries(ROOT / "configs/grafana/dashboards/training.json")))
    assert {name for name in exported if name.startswith("moeyard_train_")} <= shown


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_are_told_apart_and_do_not_overlap(path):
    board = json.loads(path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and board["uid"].startswith("moeyard-")
    for one, other in itertools.combinations((p["gridPos"] for p in board["panels"]), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in board["panels"])
    for panel in panels(board):
        assert panel["description"] and panel["targets"], panel["title"]
        assert [t["refId"] for t in panel["targets"]] == list("ABCDEFGH")[: len(panel["targets"])]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_use_the_provisioned_source(path):
    (source,) = yaml.safe_load(SOURCE.read_text())["datasources"]
    assert set(re.findall(r'"uid": "(moeyard-prometheus|[^"]*prom[^"]*)"', path.read_text())) == {
        source["uid"]
    }


def test_scraping_is_of_the_default_addresses_with_rules_that_are_there():
    path = ROOT / "configs" / "prometheus" / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    assert targets == {
        "moeyard-training": ["127.0.0.1:9401"],
        "moeyard-serving": ["127.0.0.1:8000"],
    }
    assert all((path.parent / name).is_file() for name in config["rule_files"])
    (provider,) = yaml.safe_load(
        (ROOT / "configs/grafana/provisioning/dashboards/moeyard.yml").read_text()
    )["providers"]
    assert provider["options"]["path"] == "${MOEYARD_DASHBOARDS}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "configs/prometheus/prometheus.yml"),
        ("check", "rules", "configs/prometheus/alerts.yml"),
        ("test", "rules", "tests/project/alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(arguments):
    done = subprocess.run(
        ["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_grafanas_own_schema_reads_every_field(path):
    """Grafana's SDK turns JSON into typed models and drops what its schema does not know."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    board = json.loads(path.read_text())
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert list(lost_or_changed(board, again)) == []


def lost_or_changed(one, other, place=""):
    if isinstance(one, dict) and isinstance(other, dict):
        for key, value in one.items():
            yield from lost_or_changed(value, other.get(key, "missing"), f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from lost_or_changed(mine, theirs, f"{place}[{number}]")
    elif one != other:
        yield f"{place}: {one!r} became {other!r}"
