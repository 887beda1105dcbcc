"""Our balance loss equals transformers': its term of the loss and every router's gradient.

In both directions: from a folder into a run, and from a run's export into transformers.
"""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.training.checkpoints.start_from import read_start
from moeyard.training.read_config import complete_run_config

from hf_families import BASE, CASES, make, save
from small_model import write_decoder

WITH_LOSS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": None}
NUM_LAYERS = pytest.mark.parametrize(
    "num_layers", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 4, 8))]
)
IDS = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(0))


def all_sparse(case: str, num_layers: int) -> dict:
    own = CASES[case][1]
    changed = {key: value for key, value in ALL_SPARSE.items() if key in own}
    return changed | {"num_hidden_layers": num_layers, "router_aux_loss_coef": 0.02}


def run_config(folder, **router) -> ModelConfig:
    values = {"run_dir": "unused", "start_from": str(folder), "train": {"steps": 1}}
    values["train"]["sequence_length"] = 32
    if router:
        values["model"] = {"moe": {"router": router}}
    return complete_run_config(values).model


def started_from(folder) -> Decoder:
    decoder = Decoder(run_config(folder))
    read_start(str(folder), decoder)
    return decoder.train()


def ours(decoder: Decoder) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the term that training adds, and its gradient on all parameters of all routers."""
    routings = decoder(batch_of_rows(IDS)).routings
    total = auxiliary_losses(routings, decoder.routers(), lambda counts: counts).total
    gates = [parameter for router in decoder.routers() for parameter in router.parameters()]
    return total.detach(), list(torch.autograd.grad(total, gates))


def of_transformers(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the term that transformers adds to its loss, and its gradient on all routers."""
    with_term = model(IDS, labels=IDS, output_router_logits=True)
    plain = model(IDS, labels=IDS, output_router_logits=False)
    term = model.config.router_aux_loss_coef * with_term.aux_loss
    torch.testing.assert_close(with_term.loss - plain.loss, term, atol=2e-6, rtol=0)
    gates = [
        parameter
        for name, parameter in model.named_parameters()
        if ".mlp.gate." in name or ".mlp.router." in name
    ]
    return term.detach(), list(torch.autograd.grad(term, gates))


def assert_same_loss(decoder: Decoder, model) -> None:
    value, gradients = ours(decoder)
    expected, expected_gradients = of_transformers(model)
    assert expected > 0
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    assert len(gradients) == len(expected_gradients) >= len(decoder.routers())
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for parts in (gradients, expected_gradients):
        parts.sort(key=lambda part: part.ndim)  # biases of all layers, then weights of all
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5 * largest)


@NUM_LAYERS
@pytest.mark.parametrize("case", WITH_LOSS)
def test_a_folders_balance_loss_has_the_value_and_gradients_of_transformers(
    tmp_path, case, num_layers
):
    options = all_sparse(case, num_layers)
    theirs = save(case, tmp_path / "m", output_router_logits=True, **options)
    assert_same_loss(started_from(tmp_path / "m"), theirs)


def test_dense_layers_do_not_count(tmp_path):
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    theirs = save("qwen2_moe", tmp_path / "m", num_hidden_layers=4, **options)
    assert_same_loss(started_from(tmp_path / "m"), theirs)


@NUM_LAYERS
@pytest.mark.parametrize("case", WITH_LOSS)
def test_what_we_write_has_the_same_loss_in_transformers(tmp_path, case, num_layers):
    save(case, tmp_path / "m", **all_sparse(case, num_layers))
    chosen = {"balance_loss": 0.03, "balance_over": "model" if num_layers > 1 else "layer"}
    decoder = Decoder(run_config(tmp_path / "m", **chosen))
    read_start(str(tmp_path / "m"), decoder)
    write_decoder(tmp_path / "written", decoder, eos_id=96)
    assert_same_loss(decoder.train(), AutoModelForCausalLM.from_pretrained(tmp_path / "written"))


def test_a_loss_summed_over_layers_is_written_as_the_pooled_one_of_even_counts():
    config = from_hf(make("mixtral").config.to_dict())
    router = config.moe.router.model_copy(update={"balance_loss": 0.02, "balance_over": "layer"})
    moe = config.moe.model_copy(update={"router": router})
    values = to_hf(config.model_copy(update={"moe": moe}), "float32")
    # k E/K of them per layer at perfect balance, and k for all where layers are pooled
    assert values["router_aux_loss_coef"] == pytest.approx(0.02 * 3 / 2)
    assert from_hf(values).moe.router == router  # the next run trains like this one


@pytest.mark.parametrize(
    ("case", "flag"),
    [(case, False) for case in WITH_LOSS] + [("qwen3_moe", True), ("qwen3_moe", None)],
)
def test_a_folder_without_output_router_logits_trains_without_a_balance_loss(tmp_path, case, flag):
    """For any coefficient: gpt-oss-20b's is 0.9, but the loss of transformers has no such term.
    Folders that convert writes keep the meaning."""
    save(case, tmp_path / "m", router_aux_loss_coef=0.9)
    path = tmp_path / "m/config.json"
    values = json.loads(path.read_text())
    values.pop("output_router_logits")
    path.write_text(json.dumps(values | ({} if flag is None else {"output_router_logits": flag})))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert (getattr(theirs(IDS, labels=IDS), "aux_loss", None) is not None) == bool(flag)
    router = run_config(tmp_path / "m").moe.router
    assert router.balance_loss == pytest.approx(0.9 * router.k if flag else 0)
    convert(tmp_path / "m", tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["router_aux_loss_coef"] == 0.9
    assert again.get("output_router_logits", False) == bool(flag)
    assert run_config(tmp_path / "again").moe.router == router


def test_a_run_that_asks_for_a_balance_loss_has_it_and_so_has_its_export(tmp_path):
    save("gpt_oss", tmp_path / "m", router_aux_loss_coef=0.9)
    config = run_config(tmp_path / "m", balance_loss=0.004)
    assert config.moe.router.balance_loss == 0.004
    source = json.loads((tmp_path / "m/config.json").read_text())
    values = json.loads(json.dumps(to_hf(config, "float32", source=source)))
    assert values["router_aux_loss_coef"] == pytest.approx(0.004 / 3)
    assert not values["output_router_logits"]  # or transformers could not generate in batches
    assert from_hf(values) == config
    off = to_hf(from_hf(source), "float32", source=values)
    assert from_hf(off).moe.router.balance_loss == 0, "the loss of another run was copied"


def test_a_run_that_asks_for_no_balance_loss_says_so_in_its_export():
    source = make("mixtral", output_router_logits=True, router_aux_loss_coef=0.02).config.to_dict()
    config = from_hf(source)
    router = config.moe.router.model_copy(update={"balance_loss": 0.0})
    moe = config.moe.model_copy(update={"router": router})
    values = to_hf(config.model_copy(update={"moe": moe}), "float32", source=source)
    assert values["output_router_logits"] is False and values["router_aux_loss_coef"] == 0.02


@pytest.mark.parametrize("coefficient", [0.001, 0.01, 0.02, 0.9, 0.1, 1 / 3, 1e-5, 0.0123456789])
def test_a_round_trip_keeps_the_coefficient(coefficient):
    for k in (1, 2, 3, 6, 7, 8):
        options = BASE | CASES["mixtral"][1] | {"num_local_experts": 8, "num_experts_per_tok": k}
        options |= {"router_aux_loss_coef": coefficient, "output_router_logits": True}
        source = transformers.MixtralConfig(**options).to_dict()
        found = to_hf(from_hf(source), "float32", source=source)["router_aux_loss_coef"]
        assert found == float(f"{coefficient:.12g}")
