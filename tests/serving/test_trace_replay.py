"""``moeyard trace replay``: tables, JSON, pictures and refusals; routes that a server records."""

import json
import time

import pytest

from moeyard.cli import main
from moeyard.errors import ConfigError, DataError
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routes.reader import RouteFile
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.route_recorder import RouteRecorder
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.policies.policy import CacheFacts
from moeyard.serving.experts.policies.table import LEARNING, POLICIES, open_policy
from moeyard.serving.experts.recorded import read_forwards
from moeyard.serving.experts.replay.run import Pace, replay
from moeyard.serving.loading import open_model
from moeyard.serving.replica_files import check_replica_files
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call
from small_model import CONFIG

PACE = ["--bandwidth", "1MB/s", "--layer-time", "2ms", "--expert-bytes", "5760B"]


@pytest.fixture(scope="module")
def routes(model_folder, tmp_path_factory):
    """Routes and log of ``moeyard generate``."""
    folder = tmp_path_factory.mktemp("trace")
    options = ["--max-new-tokens", "40", "--ignore-eos", "--seed", "1", "--expert-memory", "50%"]
    files = ["--record-routes", f"{folder}/a.routes", "--expert-log", f"{folder}/a.events"]
    assert main(["generate", str(model_folder), "def f(", *options, *files]) == 0
    return folder / "a.routes"


def table(capsys, *options):
    assert main(["trace", "replay", *map(str, options)]) == 0
    return capsys.readouterr().out


def test_the_table_has_every_policy_with_its_gap_to_belady(routes, capsys):
    out = table(capsys, routes, "--slots", "25%", "6")
    lines = [line.split() for line in out.splitlines()[2:-4]]
    assert [(line[0], line[1]) for line in lines] == [
        (slots, name) for slots in ("3", "6") for name in (*POLICIES, *LEARNING, "belady")
    ]
    gaps = {(line[0], line[1]): float(line[-1]) for line in lines}
    assert gaps["3", "belady"] == gaps["6", "belady"] == 1
    assert all(gap >= 1 for gap in gaps.values())


def test_predictors_and_a_pace_add_what_was_read_ahead_and_the_time(routes, capsys):
    names = "none,next_layer,previous_layers,previous_token,activations"
    options = ["--slots", "50%", "--policies", "lru", "--predictors", names, "--json", *PACE]
    found = json.loads(table(capsys, routes, *options))["outcomes"]
    none, exact, *others = found
    assert none["issued"] == none["late"] == 0 and none["stall_s"] > 0
    assert exact["issued"] == exact["useful"] + exact["late"] + exact["wasted"]
    assert exact["useful"] > 0 and exact["stall_s"] < none["stall_s"]
    needs = none["hits"] + none["misses"]
    assert all(o["hits"] + o["misses"] + o["late"] == needs for o in [exact, *others])
    out = table(capsys, routes, *options[:-7], *PACE)
    assert "predictor" in out and "stall_s" in out and "MB" in out


def test_the_picture_shows_every_policy(routes, capsys, tmp_path):
    table(capsys, routes, "--slots", "3", "--plot", tmp_path / "gap.svg")
    text = (tmp_path / "gap.svg").read_text()
    assert text.startswith("<svg") and all(f"{name}: " in text for name in (*POLICIES, "belady"))


def test_the_log_of_generate_is_followed(routes, capsys):
    out = table(capsys, routes, "--log", routes.with_suffix(".events"))
    header = RouteFile(routes).header
    facts = CacheFacts(header.moe_layers, header.num_experts, 6, header.model.architecture)
    found = replay(read_forwards([RouteFile(routes)]), facts, open_policy("decayed_lfu", facts))
    assert out.startswith("followed policy=decayed_lfu slots=6 ")
    assert f"hits={found.hits} misses={found.misses} late=0 " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "--slots has '0'; write a number above 0, or a share like 25%."),
        (["--slots", "101%"], "--slots has '101%'"),
        (["--policies", "mru"], "expert_policy is 'mru'; use one of lru, lfu,"),
        (["--policies", "hot_set", "--held-out", "1"], "hot_set learns from the part of the"),
        (["--held-out", "0"], "held-out is 0; use a share above 0 and up to 1."),
        (["--predictors", "next_layer"], "give --bandwidth, --layer-time and --expert-bytes."),
        (["--predictors", "psychic", *PACE], "expert_predictor is 'psychic'"),
        (["--bandwidth", "1MB/s"], "a replay of time needs --bandwidth, --layer-time and"),
        ([*PACE, "--layer-time", "3 days"], "--layer-time is '3 days'; write a time like 3ms"),
        ([*PACE, "--bandwidth", "0MB/s"], "use a bandwidth above 0"),
        (["--plot", "a.gif"], "--plot is a.gif; give a file that ends in .svg."),
        (["--log", "no.events"], "no.events cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_replayed_is_refused(routes, capsys, options, message):
    assert main(["trace", "replay", str(routes), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_in_place_of_routes_is_pointed_to_compare(model_folder, routes, capsys):
    assert main(["trace", "replay", str(model_folder), str(routes)]) == 2
    assert "with moeyard trace compare MODEL FILE" in capsys.readouterr().err


def test_a_disk_on_paper_makes_compute_wait_as_long_as_its_reads_take(routes):
    header, forwards = RouteFile(routes).header, read_forwards([RouteFile(routes)])
    facts = CacheFacts(header.moe_layers, header.num_experts, 1, header.model.architecture)
    pace = Pace.of(1000.0, expert_bytes=10, layer_s=0.0)
    found = replay(forwards, facts, open_policy("lru", facts), slot_bytes=10, pace=pace)
    assert found.stall_s == pytest.approx(found.misses * 0.01)
    assert found.total_s == pytest.approx(found.stall_s)
    slow = replay(forwards, facts, open_policy("lru", facts), 10, Pace(read_s=0.0, layer_s=0.5))
    layers = sum(1 for f in forwards for rows_of in f.rows_of_L)
    assert slow.total_s == pytest.approx(0.5 * layers) and slow.stall_s == 0


def test_policies_from_a_file_are_checked(model_folder, routes, tmp_path):
    def load(policy):
        return open_model(model_folder, expert_memory="50%", options=StoreOptions(policy))

    load(f"hot_set:{routes}")
    (tmp_path / "cut.routes").write_bytes(routes.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"hot_set:.*, but .* was cut short.* Record it again\."):
        load(f"hot_set:{tmp_path}/cut.routes")
    data = routes.read_bytes().replace(
        RouteFile(routes).header.model.architecture.encode(), b"0" * 16
    )
    (tmp_path / "other.routes").write_bytes(data)
    with pytest.raises(DataError, match="belongs to another model: the architecture 000"):
        load(f"hot_set:{tmp_path}/other.routes")
    for policy, message in (
        ("hot_set", "write hot_set:FILE with a route file of this model"),
        (f"lru:{routes}", "but lru reads no file; write lru"),
        ("belady", "which must know the future; use it in moeyard trace replay"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(policy)


def ask(engine, name):
    prompt = tuple(range(5))
    engine.add(GenerationRequest(name, prompt, 6, SamplingParams(temperature=0), ignore_eos=True))
    while engine.has_work:
        engine.step()


def test_a_recorder_writes_now_and_then_and_survives_a_full_disk(model_folder, tmp_path, caplog):
    model, _ = open_model(model_folder)
    engine = Engine(model, lambda ids: "x" * len(ids))
    recorder = RouteRecorder(model.decoder, tmp_path / "a.routes", flush_every_s=0.01)
    ask(engine, "a")
    deadline = time.monotonic() + 30
    file = RouteFile(tmp_path / "a.routes")
    while sum(map(len, file.chunks())) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "was cut short, or is still being written" in file.damage  # as after kill -9
    recorder._writer._file.close()
    recorder._writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    ask(engine, "b")
    recorder.close()
    ask(engine, "c")
    assert caplog.text.count("later rows are left out") == 1


def test_a_server_records_each_replica(model_folder, tmp_path):
    args = ServeArgs(
        model=str(model_folder),
        expert_memory="50%",
        record_routes=str(tmp_path / "routes"),
        expert_log=str(tmp_path / "logs"),
    )
    server = Server(args, "r1")
    body = {"model": "small", "prompt": "abc", "max_tokens": 5, "temperature": 0}
    assert call(server, "POST", "/v1/completions", json=body).status_code == 200
    server.close()
    assert [path.name for path in (tmp_path / "routes").iterdir()] == ["r1.routes"]
    rows = RouteFile(tmp_path / "routes/r1.routes").read()
    assert len(rows) >= 4 and rows.phases_N.tolist()[:3] == [1, 1, 1]
    log = str(tmp_path / "logs/r1.events")
    assert main(["trace", "replay", str(tmp_path / "routes"), "--log", log]) == 0


def test_files_that_would_stay_empty_are_refused(model_folder, tmp_path):
    dense = CONFIG.model_copy(update={"moe": None, "dense_layers": (), "d_ff": 20})
    with pytest.raises(ConfigError, match="record-routes is 'a', but the model has no experts"):
        check_replica_files(dense, "a", None, None)
    with pytest.raises(ConfigError, match="expert-log is 'a', but all experts are in memory"):
        check_replica_files(CONFIG, None, "a", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"record-routes .* cannot be made \(File exists\)"):
        Server(ServeArgs(model=str(model_folder), record_routes=str(tmp_path / "file")))
