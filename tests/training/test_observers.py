"""What a run shows to those who watch it: phases, metrics.jsonl, Prometheus, TensorBoard, W&B."""

import itertools
import json
import re
import shutil
import socket
import struct
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moeyard.parallel.mesh import Mesh
from moeyard.training.__main__ import main
from moeyard.training.observers.observers import Observer, Observers
from moeyard.training.observers.prometheus import PrometheusPort
from moeyard.training.observers.weights_and_biases import WeightsAndBiases
from moeyard.training.phases import PHASES, PhaseAverage, PhaseClock
from moeyard.training.read_config import read_run_config
from moeyard.training.step import StepResult
from moeyard.training.trainer import Trainer

import labelled
from launch import free_port


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config_file) -> Path:
    """A run of six steps; copy it before changing it."""
    run = tmp_path_factory.mktemp("observed") / "run"
    assert main([str(config_file), f"run_dir={run}"]) == 0
    return run


def scrape(port) -> dict[str, dict[tuple, float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ("layer", "expert", "phase", "operation", "copies")
            place = tuple(sample.labels[name] for name in labels if name in sample.labels)
            samples.setdefault(sample.name, {})[place] = sample.value
    return samples


def test_laps_cover_all_time_and_averages_begin_anew():
    times = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    clock = PhaseClock(lambda: next(times))
    average = PhaseAverage(clock)
    clock.lap("data")
    clock.lap("forward")
    average.count_step()
    average.count_step()
    assert average.take() == dict.fromkeys(PHASES, 0.0) | {"data": 0.5, "forward": 1.0}
    clock.lap("data")
    clock.lap("checkpoint")
    assert sum(clock.seconds.values()) == 10.0
    average.count_step()
    assert average.take() == dict.fromkeys(PHASES, 0.0) | {"data": 0.5, "checkpoint": 6.5}


def test_every_lap_of_a_step_lands_in_its_phase(tmp_path, config_file):
    """With a clock that ticks once a look, a phase's seconds are its laps."""
    overrides = [f"run_dir={tmp_path}/run", "train.accumulation=2", "train.log_every=2"]
    trainer = Trainer(read_run_config(config_file, overrides), tmp_path / "run", Mesh())
    ticks = itertools.count()
    trainer._step.phases = PhaseClock(lambda: float(next(ticks)))
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.run()
    first, second, third = (record["phases_s"] for record in metrics(tmp_path / "run"))
    a_step = {"data": 3.0, "forward": 2.0, "backward": 2.0, "reduce": 1.0, "optimizer": 2.0}
    a_step |= {"evaluate": 1.0}
    # Logging and saving follow the record of their step: step 2's log and step 3's save are in
    # the second record, step 6's are in none.
    assert first == a_step | {"log": 0.5, "checkpoint": 0.0}
    assert second == a_step | {"log": 1.0, "checkpoint": 0.5}
    assert third == a_step | {"log": 1.0, "checkpoint": 0.0}


class Recording(Observer):
    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.seen: list[str] = []

    def _see(self, what: str) -> None:
        if what == self.fails_at:
            raise RuntimeError("no route\nto host")
        self.seen.append(what)

    def step(self, done, result, phase_seconds) -> None:
        self._see("step")

    def record(self, record) -> None:
        self._see("record")

    def close(self) -> None:
        self._see("close")


def test_an_optional_observer_that_fails_is_named_once_and_left_out(caplog):
    needed, failing, other = Recording(), Recording("record"), Recording()
    observers = Observers([needed], [failing, other])
    for _ in range(2):
        observers.step(1, None, {})
        observers.record({"step": 1})
    observers.close()
    assert needed.seen == other.seen == ["step", "record"] * 2 + ["close"]
    assert failing.seen == ["step"]
    assert caplog.messages == ["Recording failed (no route to host); training goes on without it."]
    with pytest.raises(RuntimeError, match="no route"):
        Observers([Recording("record")]).record({"step": 1})


def test_the_port_counts_every_step_of_a_run_logged_or_not(tmp_path, config_file, monkeypatch):
    port, seen = free_port(), {}
    close = PrometheusPort.close

    def scrape_and_close(self):
        seen.update(scrape(port))
        close(self)

    monkeypatch.setattr(PrometheusPort, "close", scrape_and_close)
    overrides = ["train.log_every=4", f"monitor.prometheus_port={port}"]
    assert main([str(config_file), f"run_dir={tmp_path}/run", *overrides]) == 0
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [4, 6]
    last = records[-1]
    tokens = 6 * 8 * 32
    assert seen["moeyard_train_step"] == {(): 6} == seen["moeyard_train_steps_target"]
    assert seen["moeyard_train_tokens_total"] == {(): tokens}
    assert seen["moeyard_train_loss"] == {(): last["loss"]}
    assert seen["moeyard_train_eval_loss"] == {(): last["eval_loss"]}
    assert seen["moeyard_train_grad_norm"] == {(): last["grad_norm"]}
    assert seen["moeyard_train_learning_rate"] == {(): last["lr"]}
    routed = seen["moeyard_train_expert_tokens_total"]
    assert set(routed) == {(str(layer), str(e)) for layer in range(2) for e in range(4)}
    for layer in ("0", "1"):
        assert sum(n for (place, _), n in routed.items() if place == layer) == tokens * 2
        for metric, key in (
            ("expert_load_max_over_mean", "max_over_mean"),
            ("expert_load_max_violation", "max_violation"),
            ("expert_load_cv", "cv"),
            ("expert_load_entropy_nats", "entropy"),
            ("experts_idle", "idle"),
        ):
            value = seen[f"moeyard_train_{metric}"][(layer,)]
            assert value == pytest.approx(last["load"][int(layer)][key])
        assert seen["moeyard_train_rows_dropped_total"][(layer,)] == 0
    phases = seen["moeyard_train_phase_seconds_total"]
    assert set(phases) == {(phase,) for phase in PHASES}
    assert all(phases[(p,)] > 0 for p in ("data", "forward", "backward", "optimizer"))


def test_the_port_counts_the_rows_of_texts_of_any_length(tmp_path, config_file, monkeypatch):
    port, seen = free_port(), {}
    close = PrometheusPort.close

    def scrape_and_close(self):
        seen.update(scrape(port))
        close(self)

    monkeypatch.setattr(PrometheusPort, "close", scrape_and_close)
    source = labelled.write(tmp_path / "texts.jsonl")
    section = {"format": "classify", "source": str(source), "eval_fraction": 0.2}
    overrides = [f"model={json.dumps(labelled.ENCODER)}", f"data={json.dumps(section)}"]
    overrides += ["train.steps=3", f"monitor.prometheus_port={port}"]
    assert main([str(config_file), f"run_dir={tmp_path}/run", *overrides]) == 0
    rows = sum(record["step_tokens"] for record in metrics(tmp_path / "run"))
    assert seen["moeyard_train_tokens_total"] == {(): rows}
    assert rows < 3 * 8 * 32, "texts are shorter than train.sequence_length"


def result_of(counts_LE, dropped_L=(0,)) -> StepResult:
    return StepResult(1.0, 0.0, 0.0, 1.0, 1e-3, torch.tensor(counts_LE), dropped_L, False)


def port_of(config_file, *overrides) -> tuple[PrometheusPort, int]:
    port = free_port()
    overrides = (f"monitor.prometheus_port={port}", *overrides)
    config = read_run_config(config_file, overrides)
    return PrometheusPort(config), port


def test_layers_have_their_own_number_and_drops_add_up(config_file):
    observer, port = port_of(config_file, "model.dense_layers=[0]", "model.d_ff=8")
    try:
        at_start = scrape(port)  # nothing has run
        assert "moeyard_train_expert_tokens_total" not in at_start
        absent = ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "tokens_per_second")
        assert not any(f"moeyard_train_{name}" in at_start for name in absent)
        assert at_start["moeyard_train_tokens_total"] == {(): 0}, "a count of nothing is 0"
        observer.step(1, result_of([[512, 0, 0, 0]], (5,)), {"data": 1.0})
        observer.step(2, result_of([[100, 200, 200, 0]], (7,)), {"data": 2.5})
        seen = scrape(port)
    finally:
        observer.close()
    routed = seen["moeyard_train_expert_tokens_total"]
    assert routed == {("1", "0"): 612, ("1", "1"): 200, ("1", "2"): 200, ("1", "3"): 0}
    assert seen["moeyard_train_rows_dropped_total"] == {("1",): 12}
    assert seen["moeyard_train_expert_load_max_over_mean"] == {("1",): pytest.approx(1.6)}
    assert seen["moeyard_train_experts_idle"] == {("1",): 1}
    assert seen["moeyard_train_phase_seconds_total"] == {("data",): 2.5}


def test_the_way_of_rows_and_copies_have_gauges(config_file):
    observer, port = port_of(config_file)
    times = {"predicted_s": 0.1, "measured_s": 0.2, "relative_error": -0.5}
    schedule = {
        "chunks": 4,
        "backward_chunks": 2,
        "r2": {"gather": 0.9},
        "phases": {"forward": times},
    }
    copies = {"number": 7, "moved": 2, "share_without": 1.5, "share": 1.1}
    try:
        observer.record({"tokens_per_s": 1.0})
        assert "moeyard_train_layer_chunks" not in scrape(port)
        observer.record({"tokens_per_s": 1.0, "schedule": schedule, "copies": copies})
        seen = scrape(port)
    finally:
        observer.close()
    assert seen["moeyard_train_layer_chunks"] == {("forward",): 4, ("backward",): 2}
    assert seen["moeyard_train_layer_seconds_predicted"] == {("forward",): 0.1}
    assert seen["moeyard_train_layer_seconds_measured"] == {("forward",): 0.2}
    assert seen["moeyard_train_cost_model_r2"] == {("gather",): 0.9}
    assert seen["moeyard_train_expert_copies"] == {(): 7}
    assert seen["moeyard_train_experts_moved"] == {(): 2}
    shares = {("without",): 1.5, ("with",): 1.1}
    assert seen["moeyard_train_rank_load_max_over_mean"] == shares


def test_a_model_with_very_many_experts_exports_layers_only(config_file):
    observer, port = port_of(config_file)
    try:
        observer.step(1, result_of([[1] * 4097] * 2, (0, 0)), {})
        seen = scrape(port)
    finally:
        observer.close()
    assert "moeyard_train_expert_tokens_total" not in seen
    assert set(seen["moeyard_train_experts_idle"]) == {("0",), ("1",)}


def test_the_port_is_on_the_loopback_and_is_let_go(config_file):
    observer, port = port_of(config_file)
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    assert set(re.findall(rf"\d+: ([0-9A-F]+):{port:04X} [0-9A-F:]+ 0A", listening)) == {"0100007F"}
    observer.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def refusal(config_file, run_dir, capsys, *overrides) -> str:
    assert main([str(config_file), f"run_dir={run_dir}", *overrides]) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if "event=" not in line]
    assert len(shown) == 1 and shown[0].startswith("error: "), shown
    return shown[0]


def test_an_occupied_port_is_one_sentence_and_cuts_nothing(tmp_path, trained, config_file, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "metrics.jsonl").open("a").write('{"step": 7}\n')
    before = (run / "metrics.jsonl").read_text()
    capsys.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = refusal(config_file, run, capsys, f"monitor.prometheus_port={port}")
    assert f"monitor.prometheus_port is {port}, which cannot be listened on" in shown
    assert "Address already in use" in shown
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("package", "override", "remedy"),
    [
        ("torch.utils.tensorboard", "monitor.tensorboard=true", "'moeyard[tensorboard]'"),
        ("wandb", "monitor.wandb=mine", "'moeyard[wandb]'"),
    ],
)
def test_a_missing_package_is_one_sentence(
    tmp_path, config_file, capsys, monkeypatch, package, override, remedy
):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {remedy}" in refusal(config_file, tmp_path / "run", capsys, override)


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path, config_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = [str(config_file), f"run_dir={run}", "monitor.tensorboard=true"]
    assert main(options) == 0
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main([*options, "train.steps=8"]) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    records = metrics(run)
    shown = {
        "train/loss": [record["loss"] for record in records],
        "expert_load_cv/layer_1": [record["load"][1]["cv"] for record in records],
        "phase_seconds/forward": [record["phases_s"]["forward"] for record in records],
    }
    for tag, values in shown.items():
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 9))
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)


def offline_history(file: Path) -> list[dict[str, float]]:
    """Return the logged rows of an offline W&B file, once its writer has put the end there."""
    deadline = time.monotonic() + 60
    while True:
        records = offline_records(file)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in items} for items in rows]


def offline_records(file: Path) -> list:
    """Read LevelDB's log format behind 7 bytes, up to what is whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end too short for a header
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(data):
            break
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(Record.FromString(whole))
            whole = b""
    return records


def test_wandb_offline_keeps_one_id_over_a_resume(tmp_path, trained, config_file, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = read_run_config(config_file)
    records, files = metrics(trained), []
    for part in (records[:4], records[3:]):
        observer = WeightsAndBiases(config, tmp_path, "mine")
        for record in part:
            observer.record(record)
        observer.close()
        (file,) = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - set(files)
        files.append(file)
        assert file.name == f"run-{(tmp_path / 'wandb-id').read_text().strip()}.wandb"
        rows = offline_history(file)
        assert [row["_step"] for row in rows] == [record["step"] for record in part]
        assert [row["train/loss"] for row in rows] == [record["loss"] for record in part]
        assert rows[-1]["expert_load_cv/layer_1"] == part[-1]["load"][1]["cv"]


def test_wandb_that_cannot_start_is_one_sentence(tmp_path, config_file, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    shown = refusal(config_file, tmp_path / "run", capsys, "monitor.wandb=mine")
    assert "W&B did not start (No API key configured. Use `wandb login`)" in shown
    assert not (tmp_path / "run" / "wandb-id").exists()


def test_each_start_leaves_its_facts(tmp_path, trained, config_file):
    run = shutil.copytree(trained, tmp_path / "run")
    assert main([str(config_file), f"run_dir={run}", "train.steps=8"]) == 0
    first, second = (json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 6)
    assert first["ranks"] == 1 and first["precision"] == "fp32"
    decoder = Trainer(read_run_config(run / "config.yaml"), run, Mesh()).decoder
    assert first["parameters"] == sum(p.numel() for p in decoder.parameters())
    idle = 2 * 2 * 3 * 32 * 16  # layers, experts a token leaves out, and an expert's matrices
    assert first["active_parameters"] == first["parameters"] - idle
