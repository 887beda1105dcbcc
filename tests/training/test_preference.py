"""DPO of decoders: loss and gradients, the reference, ranks, resumed runs, what comes out."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from preference_pairs import write
from transformers import AutoModelForCausalLM

import moeyard
from moeyard.errors import ConfigError, Stopped
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.models.documents import batch_of_lengths
from moeyard.moe.routes.reader import read_routes
from moeyard.parallel.mesh import Mesh
from moeyard.serving.frozen_experts import open_frozen
from moeyard.training.checkpoints.export import export
from moeyard.training.cluster import ClusterSettings, cluster
from moeyard.training.data.tokenizer import ByteTokenizer
from moeyard.training.objectives.preference import MEASURES
from moeyard.training.objectives.reference import FILE
from moeyard.training.observers.observers import scalars
from moeyard.training.on_paper import workload_of
from moeyard.training.read_config import read_run_config
from moeyard.training.report.page import write_report
from moeyard.training.routes import SequenceNumbers
from moeyard.training.stop import StopRequest
from moeyard.training.trainer import Trainer

from hf_families import save
from kills import digest
from launch import ROOT, moeyard_train

EXACT = ["train.precision=fp64", "parallel.backend=reference"]
SETTINGS = ["data.beta=0.3", "data.label_smoothing=0.1", "optimizer.clip_norm=1.0e+9"]
LN_2 = 0.6931471805599453


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A small Qwen3-MoE folder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save("qwen3_moe", folder, vocab_size=260)
    ByteTokenizer().save(folder)
    shutil.copy(ROOT / "configs" / "train" / "chat.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, start) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    source = write(folder / "pairs.jsonl")
    os.utime(source, (1, 1))  # files that have just changed are read again
    values = {
        "run_dir": str(folder / "unset"),
        "start_from": str(start),
        "data": {
            "format": "preference",
            "source": str(source),
            "eval_fraction": 0.2,
        },
        "train": {"steps": 4, "sequence_length": 160, "batch_sequences": 4, "log_every": 1},
        "optimizer": {"lr": 3e-3, "warmup_steps": 0},
        "checkpoint": {"every": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def prepared(config, tmp_path_factory) -> Path:
    """The tokenized pairs, which every run here takes."""
    run_dir = tmp_path_factory.mktemp("prepared")
    trainer(config, run_dir)
    return run_dir / "data"


def trainer(config, run_dir, *overrides, data: Path | None = None, stop=None) -> Trainer:
    run_dir.mkdir(exist_ok=True)
    if data is not None and not (run_dir / "data").exists():
        shutil.copytree(data, run_dir / "data")
    found = read_run_config(config, [f"run_dir={run_dir}", *overrides])
    return Trainer(found, run_dir, Mesh(), stop)


@pytest.fixture
def begun(config, prepared, tmp_path):
    """A run with a reference, before its first step."""
    made = iter(range(9))

    def begin(*overrides) -> Trainer:
        run = trainer(config, tmp_path / f"run{next(made)}", *overrides, data=prepared)
        run.objective.before_training(run._loss, Mesh(), StopRequest())
        return run

    return begin


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scored(run: Trainer, batch) -> tuple[float, torch.Tensor]:
    """Return the loss of a batch, and the margins of its pairs."""
    with torch.no_grad():
        part = run._loss(batch)
    rewards_B2 = run._config.data.beta * (part.log_probs_B2 - batch[1])
    return float(part.loss_sum), rewards_B2[:, 0] - rewards_B2[:, 1]


def batch_of(run: Trainer):
    return run.objective.batch(0, range(4), torch.device("cpu"))


def move_reference(run: Trainer) -> None:
    """Give the reference other numbers, so that margins are not 0."""
    table = run.objective._reference.log_probs["train"]
    table += 5 * torch.arange(table.numel(), dtype=table.dtype).sin().view(table.shape)


def sequences(rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    lengths = list(rows.lengths)
    return list(zip(rows.ids_N.split(lengths), rows.targets_N.split(lengths), strict=True))


def test_loss_and_gradients_are_those_of_transformers_and_the_formula(begun, start):
    run = begun(*EXACT, *SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(start)
    rows, reference_B2 = batch_of(run)
    each = []
    for ids, targets in sequences(rows):
        scores = model(ids[None]).logits[0].log_softmax(dim=-1)
        is_answer = targets >= 0
        each.append(scores[is_answer].gather(1, targets[is_answer][:, None]).sum())
    policy_B2 = torch.stack(each).view(-1, 2).double()
    assert torch.allclose(policy_B2.detach(), reference_B2, rtol=1e-5)
    move_reference(run)
    reference_B2 = batch_of(run)[1]
    logratios_B = policy_B2[:, 0] - policy_B2[:, 1]
    logits_B = logratios_B - (reference_B2[:, 0] - reference_B2[:, 1])
    losses_B = -F.logsigmoid(0.3 * logits_B) * 0.9 - F.logsigmoid(-0.3 * logits_B) * 0.1
    losses_B.mean().backward()
    result = run._step.run(0, False)
    assert result.loss == pytest.approx(losses_B.mean().item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight"):
        theirs = model.model.get_parameter(name).grad.double()
        ours = run.decoder.get_parameter(name).main_grad
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    rewards_B2 = 0.3 * (policy_B2 - reference_B2).detach()
    wanted = {
        "accuracy": (logits_B > 0).double().mean().item(),
        "margin": 0.3 * logits_B.mean().item(),
        "chosen_reward": rewards_B2[:, 0].mean().item(),
        "rejected_reward": rewards_B2[:, 1].mean().item(),
    }
    assert result.measures == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("all", "fp32"),
        ("lora", "bf16"),
        pytest.param("all", "bf16", marks=pytest.mark.slow),
        pytest.param("router", "fp64", marks=pytest.mark.slow),
    ],
)
def test_margins_begin_at_0_to_the_bit(kind, precision, begun):
    run = begun(f"train.parameters={kind}", f"train.precision={precision}")
    for step in range(4):
        part = run._loss(run.objective.batch(step, range(4), torch.device("cpu")))
        assert part.loss_sum.item() / 4 == pytest.approx(LN_2, rel=1e-7)
        assert part.measures["margin"] == part.measures["chosen_reward"] == 0
    held_out = run.objective.evaluate(run._loss, Mesh()).metrics
    assert held_out["eval_loss"] == pytest.approx(LN_2, rel=1e-7)
    assert held_out["eval_margin"] == 0


def test_swapping_the_sides_negates_margins(begun):
    run = begun(*EXACT)
    move_reference(run)
    rows, reference_B2 = batch_of(run)
    other = [place ^ 1 for place in range(8)]
    parts = sequences(rows)
    swapped = rows._replace(
        ids_N=torch.cat([parts[place][0] for place in other]),
        targets_N=torch.cat([parts[place][1] for place in other]),
        lengths=tuple(rows.lengths[place] for place in other),
    )
    _, margins_B = scored(run, (rows, reference_B2))
    _, negated_B = scored(run, (swapped, reference_B2.flip(1)))
    assert margins_B.abs().min() > 0.01
    assert torch.allclose(negated_B, -margins_B, rtol=1e-11)


def test_pairs_count_alone_and_by_their_answers_only(begun):
    run = begun(*EXACT)
    move_reference(run)
    rows, reference_B2 = batch_of(run)
    loss, _ = scored(run, (rows, reference_B2))
    other = rows._replace(targets_N=torch.where(rows.targets_N < 0, -7, rows.targets_N))
    assert scored(run, (other, reference_B2))[0] == loss
    numbers = run._data.train.at(0, range(4))
    alone = [
        scored(run, (run._data.train.rows([number]), reference_B2[place : place + 1]))[0]
        for place, number in enumerate(numbers)
    ]
    assert sum(alone) == pytest.approx(loss, rel=1e-12)
    # Accumulation sums the same pairs.
    once, twice = (begun(*EXACT, f"train.accumulation={n}") for n in (1, 2))
    for one in (once, twice):
        move_reference(one)
    results = [one._step.run(0, False) for one in (once, twice)]
    assert results[0].loss == pytest.approx(loss / 4, rel=1e-12)
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-12)
    assert results[1].measures == pytest.approx(results[0].measures, rel=1e-11)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-11)


def test_full_conversations_have_numbers_of_their_own_in_routes(begun):
    run = begun("train.sequence_length=20")
    rows, _ = batch_of(run)
    assert 20 in rows.lengths[::2]  # a chosen side that fills its place
    numbers = SequenceNumbers(run.objective)
    numbers.expect(0, range(4))
    found = numbers.of(batch_of_lengths(rows.ids_N, np.array(rows.lengths)))
    assert len(set(found)) == 8


@pytest.fixture(scope="module")
def whole(config, prepared, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run = trainer(config, run_dir, *EXACT, "train.eval_every=2", data=prepared)
    run.run()
    return run, run_dir


def test_such_a_run_is_not_clustered_because_its_batches_need_a_reference(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"a run with data\.format preference, whose batches"):
        cluster(whole[1], tmp_path / "moe", ClusterSettings())
    assert not (tmp_path / "moe").exists()


def test_a_run_measures_pairs_and_routes_their_tokens_once(whole, tmp_path):
    run, run_dir = whole
    records = metrics(run_dir)
    assert records[0]["loss"] == pytest.approx(LN_2, abs=1e-12)
    assert records[-1]["loss"] < records[0]["loss"]
    for record in records:
        assert {f"train_{name}" for name in MEASURES} <= record.keys()
        assert record["train_margin"] == pytest.approx(
            record["train_chosen_reward"] - record["train_rejected_reward"]
        )
        assert [sum(layer) for layer in record["expert_tokens"]] == [3 * record["step_tokens"]] * 2
    held_out = run._data.held_out
    reference_P2 = run.objective._reference.log_probs["held_out"]
    found = [
        scored(run, (held_out.rows([n]), reference_P2[n : n + 1])) for n in range(len(held_out))
    ]
    last = records[-1]
    margins = torch.cat([margins for _, margins in found])
    assert last["eval_loss"] == pytest.approx(sum(loss for loss, _ in found) / len(found))
    assert last["eval_margin"] == pytest.approx(margins.mean().item())
    assert last["eval_accuracy"] == (margins > 0).double().mean().item()
    tags = scalars(last)
    assert tags["train/accuracy"] == last["train_accuracy"]
    assert tags["eval/margin"] == last["eval_margin"]
    page = write_report(run_dir, tmp_path / "page.html")[0].read_text()
    for title in ("Pairs with the chosen answer ahead", "Rewards and their margin", "per pair"):
        assert title in page


def stopped_at_2(whole, run_dir: Path) -> Path:
    shutil.copytree(whole[1], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    return run_dir


def test_a_resumed_run_keeps_its_reference_and_ends_the_same(config, whole, tmp_path):
    run_dir = stopped_at_2(whole, tmp_path / "run")
    (run_dir / "data" / FILE).unlink()  # it is computed again, of the weights of the start
    trainer(config, run_dir, *EXACT).run()
    assert digest(run_dir) == digest(whole[1])
    # A run whose first model has gone goes on as well: all it needs is in its folder.
    goes_on = yaml.safe_load((run_dir / "config.yaml").read_text())
    goes_on |= {"start_from": None, "run_dir": str(run_dir)}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(goes_on))
    alone = trainer(tmp_path / "alone.yaml", run_dir)
    alone.objective.before_training(alone._loss, Mesh(), StopRequest())
    assert alone.saves.resume() == 4
    more = trainer(tmp_path / "alone.yaml", run_dir, "train.steps=99")
    with pytest.raises(ConfigError, match=r"asks for pairs that .* does not have; give start_from"):
        more.objective.before_training(more._loss, Mesh(), StopRequest())


def test_a_reference_that_was_stopped_goes_on(config, prepared, tmp_path):
    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    run = trainer(config, tmp_path / "run", data=prepared, stop=stop)
    with pytest.raises(Stopped, match=r"while the reference was computed; start again to go on"):
        run.run()
    again = trainer(config, tmp_path / "run")
    scored_pairs = []
    again._loss.register_forward_hook(
        lambda module, given, part: scored_pairs.append(len(given[0][0].lengths) // 2)
    )
    again.objective.before_training(again._loss, Mesh(), StopRequest())
    needed = len(again._data.train.until(4)) + len(again._data.held_out)
    assert sum(scored_pairs) == needed - 4
    assert not any(
        again.objective._reference.missing(name, pairs)
        for name, pairs in (("train", again._data.train.until(4)), ("held_out", [0, 1]))
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.sequence_length=150"], "has the reference of a run with another train.seq"),
        (["model.moe.router.k=1"], "has the reference of a run with another model; put it back"),
    ],
)
def test_a_reference_of_another_run_is_refused(overrides, message, config, whole):
    run = trainer(config, whole[1], *EXACT, *overrides)
    with pytest.raises(ConfigError, match=message):
        run.run()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.beta=0"], "data.beta"),
        (["data.label_smoothing=0.5"], "data.label_smoothing"),
        (["model.moe.router.capacity={factor: 1.0}"], "router limits the rows of an expert in"),
        (["parallel.pp=3"], "pp"),
    ],
)
def test_runs_that_cannot_work_are_refused(overrides, message, config, prepared, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer(config, tmp_path / "run", *overrides, data=prepared)


def test_simulate_does_not_know_pairs(config):
    with pytest.raises(ConfigError, match="format is preference, which simulate does not know"):
        workload_of(read_run_config(config, []))


def test_a_run_needs_a_model_to_start_from(config_file, config, tmp_path):
    source = yaml.safe_load(config.read_text())["data"]["source"]
    with pytest.raises(ConfigError, match=r"start_from is not given; give the folder of the model"):
        trainer(config_file, tmp_path / "run", f"data={{format: preference, source: {source}}}")


@pytest.mark.slow
def test_frozen_experts_may_stay_in_their_folder(config, prepared, tmp_path):
    found = []
    for name, memory in (("all", []), ("half", ["train.expert_memory=50%"])):
        run_dir = tmp_path / name
        shutil.copytree(prepared, run_dir / "data")
        lora = ["train.parameters=lora", "optimizer.lr=0.02", *memory]
        own = read_run_config(config, [f"run_dir={run_dir}", *lora])
        run = Trainer(own, run_dir, Mesh(), open_source=open_frozen)
        run.objective.before_training(run._loss, Mesh(), StopRequest())
        found.append([run._step.run(step, False).loss for step in range(3)])
        if run._source is not None:
            run._source.close()
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(LN_2, rel=1e-7) and found[0][2] < 0.69


@pytest.mark.parametrize("kind", ["all", pytest.param("lora", marks=pytest.mark.slow)])
def test_exports_are_plain_decoders_that_serve(kind, config, prepared, tmp_path):
    run = trainer(config, tmp_path / "run", f"train.parameters={kind}", data=prepared)
    run.run()
    export(tmp_path / "run", tmp_path / "out")
    model = moeyard.load(tmp_path / "out")
    ids = sequences(batch_of(run)[0])[0][0][None]
    with torch.no_grad():
        own = run.decoder.eval().logits(run.decoder(batch_of_rows(ids)).hidden_TD)
    assert torch.allclose(model(ids)[0], own, atol=1e-4)
    small = moeyard.load(tmp_path / "out", expert_memory="30%")
    assert torch.equal(small(ids), model(ids))
    template = (ROOT / "configs" / "train" / "chat.jinja").read_text()
    assert model.tokenizer.chat_template == template


@pytest.mark.dist
def test_two_ranks_go_on_where_one_stopped_and_end_as_one(config, whole, tmp_path):
    run_dir = stopped_at_2(whole, tmp_path / "run")
    parallel = ["parallel.ep=2", "parallel.dense=fsdp", "monitor.routes={}"]
    overrides = [*EXACT, *parallel, "train.eval_every=2", f"run_dir={run_dir}"]
    moeyard_train(str(config), "--nproc", "2", *overrides)
    for ours, theirs in zip(metrics(run_dir), metrics(whole[1]), strict=True):
        for key in ("loss", "train_margin", "train_accuracy", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12)
        assert ours["expert_tokens"] == theirs["expert_tokens"]
    for name in ("eval_loss", *(f"eval_{name}" for name in MEASURES)):
        assert metrics(run_dir)[-1][name] == pytest.approx(metrics(whole[1])[-1][name], rel=1e-9)
    routes = read_routes(run_dir / "routes")
    names = set(zip(routes.steps_N, routes.sequences_N, routes.positions_N, strict=True))
    assert len(names) == len(routes) == sum(r["step_tokens"] for r in metrics(run_dir)[2:])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_two_ranks_compute_the_reference_of_one(kind, dense, config, prepared, tmp_path):
    one = trainer(config, tmp_path / "one", *EXACT, f"train.parameters={kind}", data=prepared)
    one.run()
    parallel = ["parallel.ep=2", f"parallel.dense={dense}", f"train.parameters={kind}"]
    moeyard_train(str(config), "--nproc", "2", *EXACT, *parallel, f"run_dir={tmp_path / 'two'}")
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm", *(f"train_{name}" for name in MEASURES)):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12)
    # One process goes on where two stopped, with their reference.
    reference = (tmp_path / "two" / "data" / FILE).read_bytes()
    longer = [*EXACT, f"train.parameters={kind}", "train.steps=5"]
    trainer(config, tmp_path / "two", *longer).run()
    trainer(config, tmp_path / "one", *longer).run()
    both = [metrics(tmp_path / name)[-1] for name in ("one", "two")]
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-9)
    assert reference and both[0]["step"] == 5
