"""``moeyard simulate``: what it prints and writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from moeyard.cli import main
from moeyard.moe.routes.format import make_header
from moeyard.moe.routes.identity import ModelIdentity
from moeyard.moe.routes.rows import Routes
from moeyard.moe.routes.writer import RouteWriter

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "configs" / "train" / "tiny.yaml")
LARGE = str(ROOT / "configs" / "train" / "a3b.yaml")
H100 = str(ROOT / "configs" / "clusters" / "h100-8x.yaml")


def simulate(*arguments: str) -> int:
    return main(["simulate", *arguments, "--cluster", H100])


def test_a_cluster_of_4096_gpus_on_paper(tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    given = ["--gpus", "32", "4096", "--sequences-per-gpu", "1", "--price", "2"]
    assert simulate(LARGE, *given, "--json", str(out), "--plot", str(picture)) == 0
    said = capsys.readouterr().out
    assert "with parallel.path=auto parallel.chunks=auto a step would take" in said
    assert "nothing was measured" in said and "parameters=30,532,122,624" in said
    found = json.loads(out.read_text())
    assert found["measured"] is False
    small, large = found["predictions"]
    assert (small["gpus"], large["gpus"]) == (32, 4096)
    assert large["batch_sequences"] == 4096
    assert small["tokens_per_s"] < large["tokens_per_s"] <= 128 * small["tokens_per_s"]
    for one in found["predictions"]:
        assert sum(one["parts_s"].values()) == pytest.approx(one["step_s"])
        assert 0 < one["mfu"] < 1 and len(one["layers"]) == 48
        hours = 1e9 / one["tokens_per_s"] / 3600 * one["gpus"]
        assert one["cost_per_billion_tokens"] == pytest.approx(2 * hours)
    root = ElementTree.fromstring(picture.read_text())
    assert root.tag.endswith("svg") and "href" not in picture.read_text()


def test_json_alone_is_all_that_is_printed(capsys):
    assert simulate(TINY, "--gpus", "8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["gpus"] == 8


def test_skew_makes_a_step_longer(capsys):
    given = (TINY, "parallel.ep=8", "--gpus", "8", "--json")
    assert simulate(*given) == simulate(*given, "--skew", "zipf:1.2") == 0
    texts = capsys.readouterr().out.split("\n}\n{")
    even, skewed = (json.loads(t) for t in (texts[0] + "\n}", "{" + texts[1]))
    even, skewed = even["predictions"][0], skewed["predictions"][0]
    assert even["layers"][0]["share"] == pytest.approx(1)
    assert skewed["layers"][0]["share"] > 1.3
    assert skewed["step_s"] > even["step_s"]


def write_routes(path: Path, architecture: str) -> None:
    rows = 64
    draw = np.random.default_rng(0)
    header = make_header(
        ModelIdentity(architecture=architecture, weights=None),
        (0, 1, 2, 3),
        8,
        2,
        weights=False,
        written_by={"program": "test"},
    )
    writer = RouteWriter(path, header)
    writer.add(
        Routes(
            tokens_N=np.zeros(rows, dtype=np.int32),
            sequences_N=np.zeros(rows, dtype=np.int64),
            positions_N=np.arange(rows, dtype=np.int32),
            steps_N=np.zeros(rows, dtype=np.int64),
            phases_N=np.zeros(rows, dtype=np.uint8),
            experts_NLK=np.stack(
                [np.zeros((rows, 4)), draw.integers(1, 8, (rows, 4))], axis=2
            ).astype(np.int32),
        )
    )
    writer.close()


def test_loads_come_from_a_route_file_of_this_model_alone(tmp_path, capsys):
    from moeyard.moe.routes.identity import identity_of
    from moeyard.training.on_paper import read_paper_config, workload_of

    model = workload_of(read_paper_config(Path(TINY))).model
    path = tmp_path / "own.routes"
    write_routes(path, identity_of(model).architecture)
    given = (TINY, "parallel.ep=8", "--gpus", "8", "--json")
    assert simulate(*given, "--routes", str(path)) == 0
    layers = json.loads(capsys.readouterr().out)["predictions"][0]["layers"]
    # Every token visits expert 0, which so has half of all rows and an eighth would be even.
    assert layers[0]["share"] == pytest.approx(4, rel=0.01)
    write_routes(path, "another")
    assert simulate(*given, "--routes", str(path)) == 2
    said = capsys.readouterr().err
    assert "belongs to another model" in said and said.count("\n") == 1


def test_owners_of_a_plan_are_in_the_json(tmp_path, capsys):
    from moeyard.moe.routes.identity import identity_of
    from moeyard.parallel.planning.plan_file import LayerPlan, PlanFile, write_plan
    from moeyard.training.on_paper import read_paper_config, workload_of

    model = workload_of(read_paper_config(Path(TINY))).model
    owner = tuple(expert % 2 for expert in range(model.moe.num_experts))
    layers = tuple(
        LayerPlan(layer=layer, owner=owner, holders=tuple((rank,) for rank in owner))
        for layer in model.moe_layers
    )
    numbers = {"num_experts": model.moe.num_experts, "ranks": 2, "ranks_per_node": 2}
    path = tmp_path / "plan.json"
    architecture = identity_of(model).architecture
    write_plan(path, PlanFile(architecture=architecture, kind="hand", layers=layers, **numbers))
    copies = f"parallel.copies={{plan: {path}, max_bytes: 1}}"
    given = (TINY, "parallel.ep=2", copies, "--gpus", "8", "--json")
    assert simulate(*given) == 0
    found = json.loads(capsys.readouterr().out)["predictions"][0]["layers"]
    assert [layer["placement"]["kind"] for layer in found] == ["owners"] * len(layers)
    assert found[0]["placement"]["owner"] == list(owner)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ([TINY, "--gpus", "12"], "which does not fill nodes of 8 GPUs"),
        ([TINY, "parallel.ep=3", "--gpus", "8"], "use a multiple of 3"),
        ([TINY], "use a multiple of 4096, or --sequences-per-gpu"),
        ([TINY, "--gpus", "8", "--skew", "hot"], "--skew is 'hot'; write zipf:1.0"),
        ([TINY, "train.stepz=5", "--gpus", "8"], "did you mean train.steps?"),
        ([TINY, "train.parameters=router", "--gpus", "8"], "simulate does not know"),
        ([TINY, "--gpus", "8", "--write-cluster", "x"], "given without --fit"),
        ([TINY, "--gpus", "8", "--fit", "/nowhere"], "cannot be read"),
        ([TINY, "--gpus", "8", "--plot", "/nowhere/x.svg"], "--plot is /nowhere/x.svg"),
        ([TINY, "--gpus", "8", "--price", "-1"], "--price is -1; use 0 or more."),
        ([TINY, "--gpus", "8", "--sequences-per-gpu", "0"], "use a multiple of"),
    ],
)
def test_slips_of_the_pen_are_answered_in_a_sentence(capsys, given, wanted):
    assert simulate(*given) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1 and said.startswith("error: ")


def test_a_model_that_does_not_fit_says_what_it_needs_and_what_would_help(capsys):
    changes = ["train.recompute=false", "parallel.ep=1"]
    assert simulate(LARGE, *changes, "--gpus", "8", "--sequences-per-gpu", "16") == 2
    said = capsys.readouterr()
    assert "!" in said.out
    assert "a rank needs" in said.err and "of 80 GB" in said.err and "help" in said.err


def write_run(folder: Path, step_s: float) -> None:
    """Write what a run of tiny.yaml on 8 GPUs leaves, with steps of about ``step_s``."""
    folder.mkdir()
    (folder / "config.yaml").write_text(Path(TINY).read_text())
    (folder / "starts.jsonl").write_text(json.dumps({"ranks": 8}) + "\n")
    records = []
    for number in range(4):
        factor = 9.0 if number == 0 else 1 + 0.01 * number  # the first one warms up
        shares = {"data": 0.01, "forward": 0.3, "backward": 0.55, "reduce": 0.1, "optimizer": 0.04}
        phases_s = {name: factor * step_s * share for name, share in shares.items()}
        phases_s |= {"evaluate": 1.0, "log": 1.0, "checkpoint": 1.0}
        loads = [[8, 1, 1, 1, 1, 1, 1, 2]] * 4
        records.append({"step": number, "phases_s": phases_s, "expert_tokens": loads})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_description_is_fitted_to_runs_and_written(tmp_path, capsys):
    write_run(tmp_path / "run", 0.02)
    fitted = tmp_path / "fitted.yaml"
    given = [TINY, "--gpus", "8", "--fit", str(tmp_path / "run"), "--write-cluster", str(fitted)]
    assert simulate(*given) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:2] == ["fitted", "to"]
    name, gpus, measured, predicted, _ = said[1].split()
    assert (name, gpus) == ("run", "8")
    assert float(measured) == pytest.approx(20.4, rel=0.001)
    assert float(predicted) == pytest.approx(20.4, rel=0.05)
    again = [TINY, "--gpus", "8", "--json", "--cluster", str(fitted)]
    assert main(["simulate", *again]) == 0
    step_s = json.loads(capsys.readouterr().out)["predictions"][0]["step_s"]
    assert 0.01 < step_s < 0.025  # with even loads, and so no slower


def test_a_run_without_steps_is_refused_in_a_sentence(tmp_path, capsys):
    write_run(tmp_path / "run", 0.02)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines[0] + "\n")
    assert simulate(TINY, "--gpus", "8", "--fit", str(tmp_path / "run")) == 2
    assert "has 1 record(s) of steps, and the first does not count" in capsys.readouterr().err


WITHOUT_TORCH = """
import sys
from moeyard.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
assert "torch" not in sys.modules
sys.exit(status)
"""


def test_help_and_a_wrong_cluster_are_answered_without_torch(tmp_path):
    wrong = tmp_path / "cluster.yaml"
    wrong.write_text(Path(H100).read_text().replace("memory: 80GB", "memory: 80 gigabytes"))
    for given, status, wanted in (
        (["--help"], 0, "--sequences-per-gpu"),
        ([TINY, "--cluster", str(wrong)], 2, "gpu.memory: it is '80 gigabytes'; write bytes"),
    ):
        command = [sys.executable, "-c", WITHOUT_TORCH, "simulate", *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == status
        assert wanted in done.stdout + done.stderr
