"""The log of a store, followed with the routes of its run, comes to the store's own counters."""

import json
import os
import time

import pytest
import torch

from moeyard.errors import ConfigError, DataError, ExpertReadError
from moeyard.moe.routers.topk import TopK
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.serving.experts.event_log import EventLog
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.policies.policy import CacheFacts
from moeyard.serving.experts.pools import Pools
from moeyard.serving.experts.recorded import read_forwards
from moeyard.serving.experts.replay.follow import LogFile, follow
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

from small_model import slots, with_router, write_random_model


@pytest.fixture(scope="module")
def early_folder(tmp_path_factory):
    """A model whose routers choose early, so that its store reads ahead."""
    folder = tmp_path_factory.mktemp("early") / "model"
    write_random_model(folder, with_router(TopK(k=2, lookahead="previous_block")))
    return folder


def run(folder, path, count, work, **options):
    """Let ``work`` use a model whose store logs; return the store's counters and both files."""
    options = StoreOptions(**options, log=path / "log.events")
    model, store = open_model(folder, expert_memory=slots(count), options=options)
    with recording(model.decoder, path / "own.routes"):
        work(model)
    store.close()
    return store.statistics.totals(), LogFile(options.log), RouteFile(path / "own.routes")


def generate(model):
    model.generate(torch.arange(9).unsqueeze(0), 30, temperature=0)
    model(torch.arange(60).reshape(2, 30))


@pytest.mark.usefixtures("reading_path")
@pytest.mark.parametrize(("count", "seed"), [(2, None), (4, None), (7, 1)])
def test_following_the_log_counts_what_the_store_counted(
    early_folder, tmp_path, monkeypatch, count, seed
):
    real = os.preadv
    if seed is not None:
        pauses = iter(torch.rand(100_000, generator=torch.Generator().manual_seed(seed)).tolist())

        def slow(*arguments):
            time.sleep(0.001 * (next(pauses) < 0.1))
            return real(*arguments)

        monkeypatch.setattr(os, "preadv", slow)
    counted, log, routes = run(early_folder, tmp_path, count, generate, policy="decayed_lfu")
    found = follow(log, read_forwards([routes])).as_dict()
    assert {name: found[name] for name in counted} == counted
    assert log.damage is None and log.header.policy == "decayed_lfu"
    assert counted["issued"] > 20 and counted["evictions"] > 20


@pytest.mark.parametrize("predictor", ["previous_layers", "next_gates"])
def test_hints_of_predictors_are_followed_too(model_folder, tmp_path, predictor):
    def work(model):
        for start in (3, 60, 120):
            model.generate(torch.arange(start, start + 5).unsqueeze(0), 60, temperature=0)

    counted, log, routes = run(model_folder, tmp_path, 5, work, predictor=predictor)
    found = follow(log, read_forwards([routes])).as_dict()
    assert {name: found[name] for name in counted} == counted
    assert counted["issued"] > 0


@pytest.mark.usefixtures("reading_path")
def test_forwards_that_failed_are_in_the_log_only(early_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)

    def work(model):
        generate(model)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_: 0)
            with pytest.raises(ExpertReadError):
                model(torch.arange(100, 130).unsqueeze(0))
        generate(model)

    counted, log, routes = run(early_folder, tmp_path, 3, work)
    found = follow(log, read_forwards([routes])).as_dict()
    assert {name: found[name] for name in counted} == counted


def break_line(log: LogFile, kind: str, change) -> LogFile:
    """Change the first event of a kind, 30 lines from the start or later."""
    lines = log.path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if n > 30 and json.loads(line)[0] == kind)
    lines[number : number + 1] = [json.dumps(event) for event in change(json.loads(lines[number]))]
    log.path.write_text("\n".join(lines) + "\n")
    return LogFile(log.path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("evict", lambda event: [event, event], "contradicts itself in line .*: evict of expert"),
        ("arrive", lambda event: [], "contradicts"),
        (
            "admit",
            lambda event: [event, event],
            "admit of expert . in layer ., which is on its way",
        ),
        ("need", lambda event: [[*event[:2], 5, 4, 3]], "contradicts"),
        ("forward", lambda event: [], "contradicts|ends after"),
        ("end", lambda event: [["end", event[1] | {"hits": 1}]], "the store counted hits=1, and"),
    ],
)
def test_a_log_that_contradicts_itself_or_the_routes_is_one_sentence(
    early_folder, tmp_path, kind, change, message
):
    _, log, routes = run(early_folder, tmp_path, 4, generate)
    with pytest.raises(DataError, match=message) as raised:
        follow(break_line(log, kind, change), read_forwards([routes]))
    assert str(raised.value).count("\n") == 0


def test_a_log_or_routes_cut_short_are_followed_as_far_as_they_go(early_folder, tmp_path):
    counted, log, routes = run(early_folder, tmp_path, 4, generate)
    forwards = read_forwards([routes])
    whole = follow(log, forwards)
    with pytest.raises(DataError, match=r"goes on in line .* after the 10 forwards of the routes"):
        follow(log, forwards[:10])
    assert follow(log, forwards[:10], routes_are_whole=False).hits == whole.hits
    data = log.path.read_bytes()
    log.path.write_bytes(data[: len(data) // 2])
    assert 0 < follow(log, forwards).hits < counted["hits"]
    assert "was cut short" in log.damage


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '{"format": "other", "version": 1}\n'])
def test_a_file_that_is_no_log_is_refused(tmp_path, text):
    (tmp_path / "a").write_text(text)
    with pytest.raises(DataError, match="is no log of this version"):
        LogFile(tmp_path / "a")


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path, caplog):
    log = EventLog(tmp_path / "a", CacheFacts((0,), 4, 2, ""), Pools((2,), (1,)), "lru")
    log._file.close()
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for _ in range(3):
        log.add("need", 0, 1)
        log._flush()
    log.close({})
    assert caplog.text.count("cannot be written any more (No space left on device)") == 1


def test_a_log_without_a_store_is_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"expert_log is .*, but all experts are in memory"):
        open_model(model_folder, options=StoreOptions(log=tmp_path / "a"))
    with pytest.raises(ConfigError, match="cannot be written"):
        options = StoreOptions(log=tmp_path / "no" / "a")
        open_model(model_folder, expert_memory="50%", options=options)
