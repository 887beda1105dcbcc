"""Adapters in batches: what they compute, and that rows do not depend on one another."""

import pytest
import torch

import moeyard
from moeyard.moe.batch import batch_of
from moeyard.moe.folders.convert import convert
from moeyard.serving.engine.engine import Engine
from moeyard.serving.loading import open_model

from adapter_folders import PREFIX, everything, fused_experts, write_adapter
from small_model import CONFIG, slots
from test_engine import latin, prompts, request, run

SCALE = 8 / 4


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two folders: everything with rank 4, and the experts alone with rank 3 and rsLoRA."""
    root = tmp_path_factory.mktemp("adapters")
    experts = {}
    for layer in (0, 2):
        experts |= fused_experts(CONFIG, layer, 3, "b")
    return {
        "a": write_adapter(root / "a", everything(CONFIG)),
        "b": write_adapter(root / "b", experts, r=3, use_rslora=True),
    }


def merged_by_hand(model_folder, tensors):
    """Add ``s B A`` to each dense weight of a model, expert by expert."""
    model, _ = open_model(model_folder)
    for index, layer in enumerate(model.decoder.layers):
        path = f"{PREFIX}model.layers.{index}."
        for name, module in layer.named_modules():
            key = f"{path}{name}.lora_A.weight"
            if key in tensors and hasattr(module, "weight"):
                b = tensors[key.replace("lora_A", "lora_B")]
                module.weight.data += SCALE * b @ tensors[key]
        if not CONFIG.is_moe(index):
            continue
        for part, weight in (("experts.base_layer", "fc1"), ("experts", "fc2")):
            a = tensors[f"{path}mlp.{part}.lora_A.weight"]
            b = tensors[f"{path}mlp.{part}.lora_B.weight"]
            for expert in range(6):  # A has experts one after the other, B has them innermost
                own_a, own_b = a[expert * 4 : expert * 4 + 4], b[:, expert::6]
                getattr(layer.mlp.experts, weight).data[expert] += SCALE * own_b @ own_a
    return model


def test_an_adapter_is_the_model_with_s_b_a_added_to_its_weights(model_folder, adapters):
    ids = torch.tensor(prompts(8)[5:6])
    model = moeyard.load(model_folder, adapters=adapters)
    expected = merged_by_hand(model_folder, everything(CONFIG))
    base, found, right = model(ids), model(ids, adapter="a"), expected(ids)
    assert (right - base).abs().max() > 1
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    # With caches: prompts and single rows, which take other kernels.
    greedy = model.generate(ids, 12, temperature=0, adapter="a")
    assert greedy.equal(expected.generate(ids, 12, temperature=0))
    assert not greedy.equal(model.generate(ids, 12, temperature=0))


@pytest.mark.parametrize(("memory", "dtype"), [(None, "float32"), ("25%", "bfloat16")])
def test_two_adapters_and_the_model_in_one_batch_have_the_bits_they_have_alone(
    model_folder, adapters, memory, dtype
):
    def engine():
        model, store = open_model(model_folder, dtype, expert_memory=memory)
        for name, path in adapters.items():
            model.adapters.load(name, path)
        built = Engine(model, latin, store, max_num_seqs=6, prefill_chunk=16)
        return built, [None, model.adapters.get("a"), model.adapters.get("b")]

    def asked(of, only=None):
        return [
            request(str(i), prompt, adapter=of[i % 3], num_logprobs=1, max_tokens=6)
            for i, prompt in enumerate(prompts(3))
            if only is None or i == only
        ]

    def scores(engine, requests):
        for one in requests:
            engine.add(one)
        found = {}
        while engine.has_work:
            for event in engine.step():
                own = [(score.token, score.logprob) for score in event.logprobs]
                found.setdefault(event.request_id, []).extend(own)
        return found

    built, of = engine()
    together = scores(built, asked(of))
    for index in range(3):
        built, of = engine()
        assert scores(built, asked(of, index))[str(index)] == together[str(index)]
    plain = scores(engine()[0], [request("0", prompts(3)[0], num_logprobs=1, max_tokens=6)])
    assert plain["0"] == together["0"]
    assert together["1"] != scores(engine()[0], asked([None] * 3, 1))["1"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_experts_with_adapters_are_the_resident_ones(model_folder, adapters, dtype):
    """In one batch, with fewer slots than one layer's rows choose."""

    def hidden(memory):
        model, _ = open_model(model_folder, dtype, expert_memory=memory)
        for name, path in adapters.items():
            model.adapters.load(name, path)
        rows = [torch.tensor(ids) for ids in prompts(4)]
        of = [None, *(model.adapters.get(name) for name in ("a", "b", "a"))]
        with torch.inference_mode():
            return model.decoder(batch_of(rows, adapters=of)).hidden_TD

    resident = hidden(None)
    assert resident.equal(hidden(slots(3, dtype))) and resident.equal(hidden(slots(9, dtype)))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_adapters_on_quantized_experts(tmp_path, bits):
    """Rows of the model keep their bits; the others are near the adapter on the same weights."""
    from small_model import write_random_model

    moe = CONFIG.moe.model_copy(update={"d_expert": 32})
    config = CONFIG.model_copy(update={"d_model": 32, "moe": moe})
    write_random_model(tmp_path / "plain", config)
    convert(tmp_path / "plain", tmp_path / bits, bits)
    adapter = write_adapter(tmp_path / "a", everything(config))
    ids = torch.tensor(prompts(8)[5:6])
    model = moeyard.load(tmp_path / bits, adapters={"a": adapter})
    offloaded = moeyard.load(tmp_path / bits, adapters={"a": adapter}, expert_memory="25%")
    found = model(ids, adapter="a")
    assert found.equal(offloaded(ids, adapter="a")) and model(ids).equal(offloaded(ids))
    rows = [ids[0], ids[0]]
    of = [None, model.adapters.get("a")]
    with torch.inference_mode():
        mixed = model.decoder(batch_of(rows, adapters=of)).hidden_TD
        base = model.decoder(batch_of(rows[:1])).hidden_TD
    assert mixed[: len(ids[0])].equal(base)
    whole = moeyard.load(tmp_path / "plain", adapters={"a": adapter})(ids, adapter="a")
    error, change = (found - whole).abs().max(), (found - model(ids)).abs().max()
    assert error < 0.5 * change


def test_a_running_request_keeps_the_adapter_it_began_with(model_folder, adapters):
    model, _ = open_model(model_folder)
    model.adapters.load("a", adapters["a"])
    prompt = prompts(3)[2]
    expected, _, _ = run(
        Engine(model, latin), [request("x", prompt, adapter=model.adapters.get("a"))]
    )
    engine = Engine(model, latin)
    engine.add(request("x", prompt, adapter=model.adapters.get("a")))
    text = "".join(event.text for _ in range(3) for event in engine.step())
    model.adapters.unload("a")
    model.adapters.load("a", adapters["b"])  # another one, under the same name
    engine.add(request("y", prompt, adapter=model.adapters.get("a")))
    other = ""
    while engine.has_work:
        for event in engine.step():
            text += event.text if event.request_id == "x" else ""
            other += event.text if event.request_id == "y" else ""
    assert text == expected["x"] != other
