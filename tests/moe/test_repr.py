"""What a REPL shows: sizes in a repr, arguments in help, one sentence for what does not fit."""

import inspect

import pytest
import torch

import moeyard
from moeyard import MoELayer, TopK
from moeyard.errors import ConfigError
from moeyard.moe.folders.convert import convert


def test_a_layer_shows_its_sizes_and_its_router():
    layer = MoELayer(16, 8, 6, TopK(k=3, score="sigmoid"), d_shared=4)
    text = repr(layer)
    total = 6 * 3 * 16 * 8 + 6 * 16 + 3 * 16 * 4
    assert f"d_model=16, d_expert=8, num_experts=6, parameters={total:,}" in text
    assert "TopKRouter(k=3 of 6 experts, score='sigmoid')" in text
    assert "Experts(6 experts, d_model=16, d_expert=8, swiglu, torch.float32 on cpu)" in text
    hashed = MoELayer(16, 8, 6, moeyard.Hash(k=2), vocab_size=9)
    assert "HashRouter(k=2 of 6 experts)" in repr(hashed)


def test_a_loaded_model_shows_what_it_is_and_what_is_on_disk(tmp_path, model_folder):
    model = moeyard.load(model_folder)
    text = repr(model)
    total = sum(p.numel() for p in model.decoder.parameters())
    unused = sum((6 - 2) * 3 * 24 * 20 for _ in model.decoder.moe_layers())
    assert f"parameters: {total:,}, of them {total - unused:,} for a token" in text
    for part in ("3, 2 of them with experts", "d_model 24, 2 heads", "float32 on cpu"):
        assert part in text
    assert "6 a layer of width 20, 2 for a token (topk)" in text
    offloaded = repr(moeyard.load(model_folder, dtype="bf16", expert_memory="50%"))
    assert "torch.bfloat16 on cpu; 50% of the experts are on disk" in offloaded
    assert f"parameters: {total:,}" in offloaded


def test_quantized_and_offloaded_experts_say_so(tmp_path):
    from small_model import CONFIG, write_random_model

    moe = CONFIG.moe.model_copy(update={"d_expert": 64})
    wide = CONFIG.model_copy(update={"d_model": 64, "head_dim": 32, "moe": moe})
    write_random_model(tmp_path / "wide", wide)
    convert(tmp_path / "wide", tmp_path / "int4", "int4")
    (_, layer), *_ = moeyard.load(tmp_path / "int4").decoder.moe_layers()
    assert "6 experts, d_model=64, d_expert=64, int4" in repr(layer.experts)
    offloaded = moeyard.load(tmp_path / "wide", expert_memory="25%")
    assert "3 slots for the 12 experts" in repr(offloaded.decoder)


@pytest.mark.parametrize(
    "thing",
    [MoELayer, moeyard.load, moeyard.auxiliary_loss, moeyard.replace_moe_blocks],
    ids=lambda thing: thing.__name__,
)
def test_help_explains_every_argument(thing):
    function = thing.__init__ if inspect.isclass(thing) else thing
    names = set(inspect.signature(function).parameters) - {"self"}
    document = inspect.getdoc(thing) or ""
    missing = {name for name in names if name not in document}
    assert missing <= {"hf_model"}, f"{missing} are not explained"


@pytest.mark.parametrize("config", [TopK, moeyard.Hash])
def test_help_explains_every_field_of_a_router(config):
    for name, field in config.model_fields.items():
        if name != "kind":
            assert f"{name}: {' '.join(field.description.split())}" in config.__doc__


X = torch.zeros(2, 5, 15)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: MoELayer(16, 8, 4)(X), r"x has shape \[2, 5, 15\], but d_model is 16; give"),
        (lambda: MoELayer(15, 8, 4)(X.tolist()), r"x is a list; give a tensor \[..., 15\]"),
        (lambda: MoELayer(15, 8, 4)(X.sum()), r"x has shape \[\], but d_model is 15"),
        (lambda: MoELayer(15, 8, 4)(X, valid=X), r"valid has shape \[2, 5, 15\] and x"),
        (lambda: MoELayer(15, 8, 4, "topk"), "router is 'topk'; give the configuration"),
        (lambda: MoELayer(15, 8, 4, torch.nn.Linear(1, 1)), "router is Linear"),
        (lambda: MoELayer(15, 8, 4, TopK), "router is <class .*TopK'>; give the configuration"),
        (lambda: MoELayer(15.5, 8, 4), "d_model is 15.5; use a whole number from 1"),
        (lambda: MoELayer(15, 8, 0), "num_experts is 0; use a whole number from 1"),
        (lambda: MoELayer(15, 8, 4, moeyard.Hash()), "needs a vocabulary; pass vocab_size"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        call()
