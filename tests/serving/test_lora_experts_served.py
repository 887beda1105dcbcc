"""LoRA experts as a served adapter: what they compute, next to plain LoRA and the model alone."""

import pytest
import torch
from lora_expert_folders import DENSE, random_tensors, write_random

import moeyard
from moeyard.errors import ModelFileError
from moeyard.moe.batch import batch_of
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.lora_experts import LoraExpertsConfig
from moeyard.serving.engine.engine import Engine
from moeyard.serving.loading import open_model
from moeyard.serving.lora_args import LoraArgs, check_adapters

from adapter_folders import everything, write_adapter
from small_model import write_random_model
from test_engine import latin, prompts, request, run


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    write_random_model(folder, DENSE)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Plain LoRA, and LoRA experts with and without weights, of different sizes."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "plain": write_adapter(root / "plain", everything(DENSE), target_parameters=None),
        "mole": write_random(root / "mole"),
        "soft": write_random(root / "soft", rank=4, experts=5, weighting="probability", seed=1),
    }


@pytest.mark.parametrize("weighting", ["none", "probability"])
def test_every_row_goes_through_the_weights_of_its_expert(dense_folder, tmp_path, weighting):
    """With the whole of ``W + w s B A`` for each row, in the last layer alone."""
    lora = LoraExpertsConfig(rank=3, alpha=6.0, experts=3, weighting=weighting)
    tensors = random_tensors(DENSE, lora)
    others = {n: None for n in tensors if not n.startswith("model.layers.2.mlp.")}
    folder = write_random(tmp_path / "last", weighting=weighting, **others)
    model = moeyard.load(dense_folder, adapters={"mole": folder})
    reads, gives = [], []
    mlp = model.decoder.layers[2].mlp

    def keep(_mlp, inputs, out):
        reads.append(inputs[0])
        gives.append(out)

    mlp.register_forward_hook(keep)
    model(torch.tensor(prompts(8)[5:6]), adapter="mole")
    (x_TD,), (y_TD,) = reads, gives
    x_TD, mlp = x_TD.double(), mlp.double()
    own = {n.removeprefix("model.layers.2.mlp."): t.double() for n, t in tensors.items()}
    probabilities = (x_TD @ own["router.weight"].T + own["router.bias"]).softmax(dim=-1)
    chosen = probabilities.argmax(dim=-1)
    assert len(set(chosen.tolist())) == 3
    right = []
    for x, expert, p in zip(x_TD, chosen, probabilities, strict=True):
        factor = 2.0 * (p[expert] if weighting == "probability" else 1)

        def weight(name, expert=expert, factor=factor):
            b, a = own[f"{name}.lora_B"][expert], own[f"{name}.lora_A"][expert]
            return getattr(mlp, name).weight + factor * b @ a

        act = torch.nn.functional.silu(weight("gate_proj") @ x) * (weight("up_proj") @ x)
        right.append(weight("down_proj") @ act)
    scale = torch.stack(right).abs().max()
    assert (torch.stack(right) - y_TD).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_rows_of_all_kinds_in_one_batch_have_the_bits_they_have_alone(
    dense_folder, adapters, dtype
):
    def engine():
        model, _ = open_model(dense_folder, dtype)
        for name, path in adapters.items():
            model.adapters.load(name, path)
        of = [None, *(model.adapters.get(name) for name in adapters)]
        return Engine(model, latin, max_num_seqs=6, prefill_chunk=16), of

    def scores(engine, requests):
        for one in requests:
            engine.add(one)
        found = {}
        while engine.has_work:
            for event in engine.step():
                own = [(score.token, score.logprob) for score in event.logprobs]
                found.setdefault(event.request_id, []).extend(own)
        return found

    def asked(of, only):
        return [
            request(str(i), prompt, adapter=of[i], num_logprobs=1, max_tokens=6)
            for i, prompt in enumerate(prompts(4))
            if i in only
        ]

    built, of = engine()
    together = scores(built, asked(of, range(4)))
    for index in range(4):
        built, of = engine()
        assert scores(built, asked(of, [index])) == {str(index): together[str(index)]}
    without, _ = open_model(dense_folder, dtype)
    plain = scores(Engine(without, latin), asked([None], [0]))
    assert plain["0"] == together["0"]
    assert together["2"] != scores(engine()[0], asked([None] * 4, [2]))["2"]


def test_a_running_request_keeps_its_experts_while_they_are_exchanged(dense_folder, adapters):
    model, _ = open_model(dense_folder)
    model.adapters.load("a", adapters["mole"])
    prompt = prompts(3)[2]
    base, _, _ = run(Engine(model, latin), [request("z", prompt)])
    expected, _, _ = run(
        Engine(model, latin), [request("x", prompt, adapter=model.adapters.get("a"))]
    )
    engine = Engine(model, latin)
    engine.add(request("x", prompt, adapter=model.adapters.get("a")))
    engine.add(request("z", prompt))
    texts = {"x": "", "y": "", "z": ""}
    for _ in range(3):
        for event in engine.step():
            texts[event.request_id] += event.text
    model.adapters.unload("a")
    model.adapters.load("a", adapters["soft"])  # others, under the same name
    engine.add(request("y", prompt, adapter=model.adapters.get("a")))
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.text
    assert texts["x"] == expected["x"] and texts["z"] == base["z"]
    assert len(set(texts.values())) == 3


def test_routers_stay_in_fp32_and_rows_without_adapters_are_untouched(dense_folder, adapters):
    model, _ = open_model(dense_folder, "bfloat16")
    model.adapters.load("mole", adapters["mole"])
    adapter = model.adapters.get("mole")
    assert {u.router.weight.dtype for u in adapter.mlps.values()} == {torch.float32}
    assert {u.update.fc1_EPD[0].dtype for u in adapter.mlps.values()} == {torch.bfloat16}
    rows = [torch.tensor(ids) for ids in prompts(2)]
    with torch.inference_mode():
        mixed = model.decoder(batch_of(rows, adapters=[None, adapter])).hidden_TD
        alone = model.decoder(batch_of(rows[:1])).hidden_TD
    assert mixed[: len(rows[0])].equal(alone)


def test_a_server_looks_at_the_folders_before_it_reads_weights(dense_folder, adapters, tmp_path):
    def check(folder):
        args = LoraArgs(lora=[f"mole={folder}"])
        check_adapters(args, ModelFolder(dense_folder), "small", None, num_replicas=1)

    check(adapters["mole"])
    wide = write_random(tmp_path / "wide", DENSE.model_copy(update={"d_ff": 28}))
    with pytest.raises(ModelFileError, match=r"adapter 'mole': .* another model or rank"):
        check(wide)
