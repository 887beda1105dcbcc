"""The training program: learns, resumes, stops, refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from moeyard.errors import CheckpointError, ConfigError, TrainingError
from moeyard.parallel.mesh import Mesh
from moeyard.training import saves
from moeyard.training.__main__ import main
from moeyard.training.checkpoints.checkpoint import Checkpoints
from moeyard.training.checkpoints.files import read_state, verify
from moeyard.training.read_config import read_run_config
from moeyard.training.run.folder import claim_run_folder
from moeyard.training.stop import StopRequest
from moeyard.training.trainer import Trainer

from kills import digest
from launch import environment, moeyard_train, torchrun


def run_here(config_file, run_dir, *overrides) -> int:
    return main([str(config_file), f"run_dir={run_dir}", *overrides])


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_leaves_a_run_folder(tmp_path, config_file, capsys):
    run = tmp_path / "run"
    assert run_here(config_file, run, "train.steps=40", "optimizer.lr=0.01") == 0
    records = metrics(run)
    assert [r["step"] for r in records] == list(range(1, 41))
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert records[0]["loss"] == pytest.approx(math.log(257), rel=0.02)
    assert records[-1]["eval_loss_per_byte"] < records[0]["loss"]
    assert (run / "latest").read_text().strip() == "step-00000040"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000039",
        "step-00000040",
    ]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 40
    shown = capsys.readouterr().err
    assert "event=started" in shown and "worst_load=" in shown and "left_s=" in shown


def test_a_second_program_may_not_write_to_the_same_run(tmp_path, config_file, capsys):
    run = tmp_path / "run"
    claim = claim_run_folder(run)
    assert run_here(config_file, run) == 2
    assert "which another program is training in" in capsys.readouterr().err
    assert not list(run.iterdir())
    os.close(claim)
    assert run_here(config_file, run) == 0


def test_a_finished_run_says_so_and_how_to_go_on(tmp_path, config_file, capsys):
    run = tmp_path / "run"
    assert run_here(config_file, run) == 0
    assert "event=finished" not in capsys.readouterr().err
    assert run_here(config_file, run) == 0
    shown = capsys.readouterr().err
    assert "event=finished step=6" in shown and "raise train.steps" in shown


@pytest.mark.parametrize("router", ["{kind: hash, k: 2}", "{kind: topk, k: 1, renormalize: false}"])
def test_routed_rows_are_tokens_times_choices(tmp_path, config_file, router):
    assert run_here(config_file, tmp_path / "run", f"model.moe.router={router}") == 0
    k = yaml.safe_load(router)["k"]
    for record in metrics(tmp_path / "run"):
        assert [sum(layer) for layer in record["expert_tokens"]] == [record["step_tokens"] * k] * 2
        assert all(layer["dropped"] == 0 for layer in record["load"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path, config_file, precision):
    options = [f"train.precision={precision}", "model.moe.router.jitter=0.1"]
    assert run_here(config_file, tmp_path / "whole", *options) == 0
    assert run_here(config_file, tmp_path / "parts", *options, "train.steps=6") == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000006")
    assert run_here(config_file, tmp_path / "parts", *options) == 0
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    times = ("step_s", "tokens_per_s", "phases_s")
    timeless = [
        [{k: v for k, v in r.items() if k not in times} for r in metrics(d)]
        for d in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert timeless[0] == timeless[1]


def bend(path, name):
    file = next(path.glob(name))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "flipped_shard": (lambda p: bend(p, "*.distcp"), "distcp does not match its hash"),
    "flipped_metadata": (lambda p: bend(p, ".metadata"), ".metadata does not match"),
    "flipped_state": (lambda p: bend(p, "state.json"), "state.json does not match"),
    "cut_shard": (
        lambda p: os.truncate(next(p.glob("*.distcp")), 100),
        "has 100 bytes, the manifest says",
    ),
    "no_shard": (lambda p: next(p.glob("*.distcp")).unlink(), "distcp is missing"),
    "no_manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "cut_manifest": (lambda p: os.truncate(p / "manifest.json", 30), "unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, config_file, damage, caplog):
    run = tmp_path / "run"
    assert run_here(config_file, run) == 0
    whole = digest(run)
    apply, message = DAMAGES[damage]
    apply(run / "checkpoints" / "step-00000006")
    assert message in verify(run / "checkpoints" / "step-00000006")
    assert run_here(config_file, run) == 0
    assert "step-00000006" in caplog.text and message in caplog.text
    assert digest(run) == whole


def test_a_run_without_a_whole_checkpoint_does_not_start_over_silently(tmp_path, config_file):
    run = tmp_path / "run"
    assert run_here(config_file, run) == 0
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert run_here(config_file, run) == 1
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        Checkpoints(run, Mesh(), 2).newest_whole()


def test_metadata_that_calls_something_is_refused(tmp_path, config_file):
    import pickle

    from moeyard.training.checkpoints.dcp_reader import SafeFileSystemReader

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="do not use this folder"):
        SafeFileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "canary").exists()


@pytest.mark.dist
def test_a_checkpoint_continues_on_other_ranks(tmp_path, config_file):
    """1 rank, then 2 with EP=2, then 1 again: the weights of the unbroken single-rank run."""
    exact = ["train.precision=fp64", "parallel.backend=reference", "train.steps=9"]
    assert run_here(config_file, tmp_path / "one", *exact) == 0
    moved = [str(config_file), f"run_dir={tmp_path}/moved", *exact]
    assert run_here(config_file, tmp_path / "moved", *exact, "checkpoint.keep=9") == 0
    for step in (6, 9):
        shutil.rmtree(tmp_path / f"moved/checkpoints/step-{step:08d}")
    moeyard_train(*moved, "--nproc", "2", "parallel.ep=2")
    shutil.rmtree(tmp_path / "moved/checkpoints/step-00000009")
    assert run_here(config_file, tmp_path / "moved", *exact) == 0
    from moeyard.training.checkpoints.checkpoint import StoredTensors

    one = StoredTensors(tmp_path / "one/checkpoints/step-00000009")
    two = StoredTensors(tmp_path / "moved/checkpoints/step-00000009")
    assert one.keys() == two.keys()
    for key in filter(lambda key: key.startswith("weight/"), one):
        torch.testing.assert_close(two[key], one[key], rtol=1e-12, atol=1e-13)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.dist
@pytest.mark.parametrize(
    "program",
    [
        ["moeyard.cli", "train", "--nproc", "2"],
        pytest.param(["moeyard.training"], marks=pytest.mark.slow),
        pytest.param([*TORCHRUN, "-m", "moeyard.training"], marks=pytest.mark.slow),
    ],
    ids=lambda program: program[0],
)
def test_sigterm_saves_and_exits_with_0(tmp_path, config_file, program):
    run = tmp_path / "run"
    ranks = 2 if "2" in program else 1
    command = [sys.executable, "-m", *program, str(config_file), f"run_dir={run}"]
    command += ["train.steps=100000", "checkpoint.every=100000", f"parallel.ep={ranks}"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment(), cwd="/", stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    text = (tmp_path / "log.txt").read_text()
    assert "event=stopped reason=SIGTERM" in text
    newest = Checkpoints(run, Mesh(), 1).newest_whole()
    assert newest is not None and f"saved_step={int(newest.name[5:])}" in text
    if program[0] != "torch.distributed.run":
        assert status == 0 and "Traceback" not in text and "torch/distributed" not in text
    else:  # torchrun reports its own signal; its workers ended well
        assert "exitcode" not in text


@pytest.mark.parametrize(("part", "layer"), [("gate.weight", 0), ("experts.fc1", 1)])
def test_stops_before_an_update_that_is_not_finite(tmp_path, config_file, part, layer):
    """What an expert breaks shows in the next layer's router."""
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run"])
    trainer = Trainer(config, tmp_path / "run", Mesh())
    with torch.no_grad():
        trainer.decoder.layers[0].mlp.get_parameter(part)[0].fill_(float("nan"))
    before = {n: p.clone() for n, p in trainer.decoder.named_parameters()}
    with pytest.raises(TrainingError, match=f"router of layer {layer}, and nothing was updated"):
        trainer.run()
    for name, parameter in trainer.decoder.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


BAD = {
    "misspelt": ("trian.steps=3", "trian is not a known key; did you mean train?"),
    "misspelt_inside": ("train.stps=3", "train.stps is not a known key; did you mean train.steps?"),
    "misspelt_router": (
        "model.moe.router.renormalise=true",
        "did you mean model.moe.router.renormalize?",
    ),
    "unknown": ("train.zzzzzzzz=3", "train.zzzzzzzz is not a known key; remove it"),
    "not_a_number": ("train.steps=many", "train.steps: it is 'many', but should be a valid"),
    "negative": ("train.steps=0", "train.steps: it is 0, but should be greater than"),
    "infinite": ("optimizer.lr=.inf", "optimizer.lr: it is inf, but should be a finite number"),
    "too_many_choices": ("model.moe.router.k=5", "router.k is 5, but the layer has 4 experts"),
    "unknown_router": ("model.moe.router.kind=magic", "model.moe.router"),
    "heads": ("model.num_kv_heads=3", "num_heads is 4, which num_kv_heads = 3 does not divide"),
    "accumulation": ("train.accumulation=3", "train.batch_sequences is 8, which train.accum"),
    "too_long": ("train.sequence_length=300", "but model.max_positions is 256"),
    "dense": ("parallel.dense=zero", "it is 'zero', but should be 'ddp', 'fsdp' or 'deepspeed'"),
    "ep_experts": ("parallel.ep=3", "parallel.ep is 3, which does not divide the 1 rank"),
    "ep_dense": ("model.moe=null|model.d_ff=8|parallel.ep=2", "but the model has no experts"),
    "no_width": ("model.moe=null", "d_ff is missing"),
    "tokenizer": ("data.tokenizer=/nowhere", "data.tokenizer is '/nowhere', which is not a folder"),
    "source": ("data.source=/nowhere.txt", "data.source is '/nowhere.txt', which cannot be read"),
    "small_vocabulary": ("model.vocab_size=100", "model.vocab_size is 100, but the tokenizer"),
    "unwritable": ("run_dir=/proc/nowhere", "run_dir is '/proc/nowhere', which cannot be written"),
    "betas": ("optimizer.betas=[0.9,1.0]", "optimizer.betas.1: it is 1.0, but should be less"),
    "no_router_kind": ("model.moe.router={k: 2}", "model.moe.router.kind is missing; use one of"),
    "infinite_theta": ("model.rope_theta=.inf", "model.rope_theta: it is inf, but should be"),
    "eval_source": ("data.eval_source=/nowhere.txt", "data.eval_source is '/nowhere.txt', which"),
    "not_an_override": ("train", "override 'train' is not of the form key.key=value"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_gets_one_sentence_and_leaves_nothing(
    tmp_path, config_file, capsys, case
):
    overrides, message = BAD[case]
    run = tmp_path / "run"
    status = run_here(config_file, run, *overrides.split("|"))
    shown = capsys.readouterr().err
    assert status == 2, shown
    said = [line for line in shown.splitlines() if "event=" not in line]
    assert len(said) == 1 and said[0].startswith("error: ") and message in said[0], shown
    assert not run.exists() or {p.name for p in run.iterdir()} <= {"data"}


@pytest.mark.parametrize("content", ["a: [", "- 1\n", ""], ids=["broken", "a_list", "empty"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_run_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run_config(tmp_path / "none.yaml")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.ep=4", "parallel.ep is 4, which does not divide the 2 rank"),
        ("data.source=/nowhere.txt", "data.source is '/nowhere.txt', which cannot be read"),
        pytest.param(
            "train.batch_sequences=7", "does not split over 2 ranks", marks=pytest.mark.slow
        ),
        pytest.param(
            "run_dir=/proc/nowhere",
            "run_dir is '/proc/nowhere', which cannot be written",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_torchrun_refuses_meshes_that_do_not_fit(tmp_path, config_file, override, message):
    with pytest.raises(AssertionError, match=message) as caught:
        torchrun(2, "-m", "moeyard.training", str(config_file), f"run_dir={tmp_path}/run", override)
    text = str(caught.value)
    assert text.count("\nerror: ") == 1, "each sentence is said once on a host"
    assert message in text.splitlines()[-2], "torchrun's table ends with the sentence"
    assert "[rank" not in text, "a rank died with a traceback"


def test_a_changed_model_under_an_old_run_is_refused(tmp_path, config_file, capsys):
    run = tmp_path / "run"
    assert run_here(config_file, run) == 0
    capsys.readouterr()
    assert run_here(config_file, run, "model.num_layers=3") == 1
    assert "has model.num_layers = 2, but the configuration says 3" in capsys.readouterr().err


def test_a_checkpoint_from_before_the_routers_newest_fields_means_their_defaults(
    tmp_path, config_file, capsys, monkeypatch
):
    def older(path):
        state = read_state(path)
        for name in ("logit_bias", "group_score"):
            del state["model"]["moe"]["router"][name]
        return state

    run = tmp_path / "run"
    assert run_here(config_file, run) == 0
    before = digest(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    monkeypatch.setattr(saves, "read_state", older)
    capsys.readouterr()
    assert run_here(config_file, run) == 0
    assert "event=resumed step=3 " in capsys.readouterr().err
    assert digest(run) == before
    assert run_here(config_file, run, "model.moe.router.logit_bias=true") == 1
    assert "use the same model or a new run_dir" in capsys.readouterr().err


def test_print_config_shows_the_merged_values(config_file, capsys):
    assert main([str(config_file), "train.steps=77", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["steps"] == 77 and shown["optimizer"]["weight_decay"] == 0.1


def test_keeping_few_checkpoints_never_deletes_the_only_whole_one(tmp_path, config_file):
    run, steps = tmp_path / "run", "train.steps=12"
    assert run_here(config_file, run, steps, "checkpoint.keep=9") == 0
    folder = run / "checkpoints"
    bend(folder / "step-00000012", "*.distcp")
    shutil.copytree(folder / "step-00000009", folder / "step-00000009.bak")
    shutil.rmtree(folder / "step-00000003")
    shutil.rmtree(folder / "step-00000006")
    stopping = [steps, "checkpoint.keep=1", "checkpoint.every=1"]
    config = read_run_config(config_file, [f"run_dir={run}", *stopping])
    stop = StopRequest()
    stop.signal_name = "SIGTERM"  # one step from the newest whole checkpoint, then a save
    Trainer(config, run, Mesh(), stop).run()
    left = sorted(path.name for path in folder.iterdir())
    assert left[1:] == ["step-00000009.bak", "step-00000010"]
    assert left[0].startswith("damaged-step-00000012")
    assert verify(folder / "step-00000010") is None
    assert (run / "latest").read_text() == "step-00000010\n"


def test_a_bent_manifest_is_a_damaged_checkpoint_and_never_a_crash(tmp_path, config_file):
    run = tmp_path / "run"
    assert run_here(config_file, run, "train.steps=3") == 0
    manifest = run / "checkpoints" / "step-00000003" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 7):
        for bit in (1, 8, 64):
            bent = bytearray(whole)
            bent[place] ^= bit
            manifest.write_bytes(bent)
            problem = verify(manifest.parent)  # must not raise
            assert problem or json.loads(bent)["files"] == json.loads(whole)["files"]


def test_a_refused_start_leaves_the_run_as_it_was(tmp_path, config_file):
    run = tmp_path / "run"
    assert run_here(config_file, run) == 0

    def contents():
        return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}

    before = contents()
    for overrides in (["data.tokenizer=/nowhere"], ["seed=9"], ["train.batch_sequences=16"]):
        assert run_here(config_file, run, "train.steps=9", *overrides) in (1, 2)
        assert contents() == before


FULL_DISK = """
import resource, sys
from moeyard.training.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.dist
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, config_file):
    run = tmp_path / "run"
    assert run_here(config_file, run, "train.steps=3") == 0
    whole = digest(run)
    command = [sys.executable, "-c", FULL_DISK, str(config_file), f"run_dir={run}"]
    done = subprocess.run(
        command, env=environment(), cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        "could not be written (" in done.stderr and "the previous one is untouched" in done.stderr
    )
    assert digest(run) == whole
    assert run_here(config_file, run) == 0  # with room again, the run goes on
    assert metrics(run)[-1]["step"] == 6


@pytest.mark.parametrize("kind", ["task", "timestep"])
def test_a_router_that_reads_what_text_does_not_have_is_refused_before_a_run_starts(
    config_file, tmp_path, kind
):
    for path, router in (
        ("model.moe.router", f"{{kind: {kind}}}"),
        ("model.moe.router.router", f"{{kind: local_search, router: {{kind: {kind}}}}}"),
    ):
        options = [f"run_dir={tmp_path}/run", f"model.moe.router={router}"]
        with pytest.raises(ConfigError) as caught:
            read_run_config(config_file, options)
        assert str(caught.value).startswith(f"{path}.kind is {kind}, which reads the t")
        assert "choose another router, or pass t" in str(caught.value)
