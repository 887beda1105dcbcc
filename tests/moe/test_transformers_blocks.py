"""MoELayer in the place of transformers' MoE blocks: the same numbers, and training goes on."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.transformers_blocks import NAMES

from hf_families import CASES, make

FITTING = [case for case in CASES if not case.startswith(("llama", "qwen3"))] + [
    "qwen3_moe",
    "qwen3_moe_bias_window_tied",
]
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(7))


def pair(case: str, **options):
    """Return a model, and its copy with our layers."""
    theirs = make(case, **options)
    ours = copy.deepcopy(theirs)
    assert moeyard.replace_moe_blocks(ours) == len(layers_of(ours)) > 0
    return theirs, ours


def layers_of(model) -> list[moeyard.MoELayer]:
    return [module for module in model.modules() if isinstance(module, moeyard.MoELayer)]


def close(found, expected, tolerance=1e-5):
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1.0))


def grads(model) -> dict[str, torch.Tensor]:
    """Return the gradients under transformers' names and in its layout."""
    values = {name: p.grad for name, p in model.named_parameters()}
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in shadow.named_parameters():
            assert values[name] is not None, f"{name} has no gradient"
            parameter.copy_(values[name])
    return {n: t for n, t in shadow.state_dict().items() if "correction_bias" not in n}


@pytest.mark.parametrize("case", FITTING)
def test_logits_and_gradients_are_those_of_transformers(case):
    theirs, ours = pair(case)
    close(ours(IDS).logits, theirs(IDS).logits)
    for model in (theirs, ours):
        model.train()(IDS, labels=IDS).loss.backward()
    right, found = grads(theirs), grads(ours)
    assert found.keys() == right.keys()
    for name, expected in right.items():
        close(found[name], expected)


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_training_goes_on_with_the_same_weights(case):
    """In fp64: rounding would grow from step to step. transformers' norms and routers are fp32."""
    theirs, ours = (model.double().train() for model in pair(case))
    theirs.set_experts_implementation("eager")  # the usual one takes no fp64
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
    weights, right = ours.state_dict(), theirs.state_dict()
    assert weights.keys() == right.keys()
    for name, expected in right.items():
        close(weights[name], expected)
    close(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)


def test_parameters_are_the_same_objects_so_an_optimizer_keeps_them():
    for case in ("qwen2_moe", "deepseek_v3"):
        model = make(case)
        before = {id(parameter) for parameter in model.parameters()}
        moeyard.replace_moe_blocks(model)
        assert {id(parameter) for parameter in model.parameters()} == before


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_save_pretrained_writes_what_transformers_would_and_load_state_dict_reads_it(
    tmp_path, case
):
    theirs, ours = pair(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    right, found = (
        {
            k: v
            for f in sorted((tmp_path / n).glob("*.safetensors"))
            for k, v in load_file(f).items()
        }
        for n in ("theirs", "ours")
    )
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    close(again(IDS).logits, theirs(IDS).logits)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    ours.load_state_dict(theirs.state_dict())
    close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called_before"])
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_router_logits_and_their_loss_go_on_to_work(case, called):
    theirs = make(case, router_aux_loss_coef=0.3)
    if called:  # transformers has put its hooks on the routers by then
        theirs(IDS, output_router_logits=True)
    ours = copy.deepcopy(theirs)
    moeyard.replace_moe_blocks(ours)
    for model in (theirs, ours):
        model.train()
    right = theirs(IDS, labels=IDS, output_router_logits=True)
    found = ours(IDS, labels=IDS, output_router_logits=True)
    for logits, expected in zip(found.router_logits, right.router_logits, strict=True):
        close(logits, expected)
    close(found.aux_loss, right.aux_loss)
    close(found.loss, right.loss)


def test_the_auxiliary_loss_of_our_layers_is_the_one_that_transformers_adds():
    theirs, ours = pair("qwen3_moe", router_aux_loss_coef=0.3, output_router_logits=True)
    right = theirs.train()(IDS, labels=IDS)
    plain = ours.train()(IDS, labels=IDS, output_router_logits=False)
    layers = layers_of(ours)
    own = moeyard.auxiliary_loss(layers, [layer.routing for layer in layers])
    close(plain.loss + own, right.loss)
    own.backward()
    assert all(layer.gate.weight.grad.abs().max() > 0 for layer in layers)


def test_a_swapped_model_generates_is_copied_and_is_not_swapped_again():
    theirs, ours = pair("mixtral")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))
    ours(IDS, labels=IDS).loss.backward()
    twin = copy.deepcopy(ours)
    close(twin(IDS).logits, ours(IDS).logits)
    assert moeyard.replace_moe_blocks(ours) == 0


def test_gradient_checkpointing_gives_the_same_gradients():
    _, ours = pair("olmoe")
    ours.train()(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours(IDS, labels=IDS).loss.backward()
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name])


@pytest.mark.parametrize(
    "model, sentence",
    [
        (
            lambda: make("llama"),
            "LlamaForCausalLM of model_type 'llama'; the MoE blocks",
        ),
        (lambda: torch.nn.Linear(2, 2), "a Linear of model_type None"),
        (lambda: make("mixtral", router_jitter_noise=0.1), "router_jitter_noise = 0.1"),
        (lambda: make("gpt_oss", swiglu_limit=3.0), "swiglu_limit"),
    ],
    ids=["dense", "no_transformers", "jitter", "other_activation"],
)
def test_a_model_that_does_not_fit_gets_a_sentence_and_stays_as_it_was(model, sentence):
    model = model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=sentence):
        moeyard.replace_moe_blocks(model)
    assert [type(module) for module in model.modules()] == before


def test_every_family_that_transformers_has_can_be_swapped():
    """Those of decoders; encoder-decoders keep transformers' layers."""
    decoders = {name for name, family in FAMILIES.items() if "decoder" in family.kinds}
    experts = {name for name in decoders if FAMILIES[name].has_experts}
    assert {n for n in experts if FAMILIES[n].is_in_transformers} == NAMES.keys()
    assert all(hasattr(transformers, FAMILIES[name].architecture) for name in NAMES)
