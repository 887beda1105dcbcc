"""Adapter folders: older names, layouts of experts, and what is refused in one sentence."""

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.errors import ConfigError, ModelFileError
from moeyard.moe.folders.adapters import adapter_table
from moeyard.moe.folders.peft.config import LoraConfig
from moeyard.moe.folders.peft.experts import Factors, from_peft, joined, to_peft
from moeyard.moe.folders.peft.write import adapter_config, write_adapter_folder

from adapter_folders import PREFIX, attention, fused_experts, pair, write_adapter
from hf_families import save


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    save("mixtral", folder)
    return moeyard.load(folder)


def read(model, folder):
    model.adapters.load("a", folder)
    adapter = model.adapters.get("a")
    model.adapters.unload("a")
    return adapter


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_pefts_layout_of_experts_is_a_matrix_for_each():
    """peft multiplies ``einsum("o r e, e r i -> e o i")`` of B ``[o, r e]`` and A ``[e r, i]``."""
    a, b = draw(5 * 3, 7), draw(4, 3 * 5)
    expected = torch.einsum("ore,eri->eoi", b.reshape(4, 3, 5), a.reshape(5, 3, 7))
    a_EPI, b_EOP = from_peft(Factors(a, b), 5)
    torch.testing.assert_close(b_EOP @ a_EPI, expected)
    again = to_peft(a_EPI, b_EOP)
    assert again.a.equal(a) and again.b.equal(b)


def test_two_updates_of_different_ranks_are_one_with_blocks():
    gate, up = (draw(5, 2, 7), draw(5, 4, 2)), (draw(5, 3, 7), draw(5, 4, 3))
    a, b = joined(gate, up)
    torch.testing.assert_close(b @ a, torch.cat((gate[1] @ gate[0], up[1] @ up[0]), dim=1))


def test_linear_layers_of_single_experts_are_the_fused_parameters(mixtral, tmp_path):
    """transformers 4 had w1, w3 and w2 of each expert, of which some may have no update."""
    tensors = {}
    for expert in (0, 4):
        for name, inputs, outputs in (("w1", 40, 24), ("w3", 40, 24), ("w2", 24, 40)):
            path = f"model.layers.2.block_sparse_moe.experts.{expert}.{name}"
            tensors |= pair(path, 4, inputs, outputs)
    a, b = torch.zeros(6, 8, 40), torch.zeros(6, 48, 8)
    a2, b2 = torch.zeros(6, 4, 24), torch.zeros(6, 40, 4)
    for expert in (0, 4):
        path = f"{PREFIX}model.layers.2.block_sparse_moe.experts.{expert}"
        a[expert, :4], a[expert, 4:] = (tensors[f"{path}.{n}.lora_A.weight"] for n in ("w1", "w3"))
        b[expert, :24, :4] = tensors[f"{path}.w1.lora_B.weight"]
        b[expert, 24:, 4:] = tensors[f"{path}.w3.lora_B.weight"]
        a2[expert], b2[expert] = (tensors[f"{path}.w2.lora_{m}.weight"] for m in "AB")
    path = "model.layers.2.mlp.experts"
    fused = {f"{path}.base_layer": to_peft(a, b), path: to_peft(a2, b2)}
    one = write_adapter(tmp_path / "one", tensors)
    write_adapter_folder(tmp_path / "all", adapter_config(4, 8, [], True), fused)
    (single,), (both,) = (
        list(read(mixtral, folder).experts.values()) for folder in (one, tmp_path / "all")
    )
    for found, right in zip(
        single.fc1_EPD + single.fc2_EPF, both.fc1_EPD + both.fc2_EPF, strict=True
    ):
        assert found.equal(right) and right.any()


def test_patterns_name_modules_as_in_peft():
    config = LoraConfig(
        8, 16, rank_pattern={"o_proj": 2, r".*\.gate_up_proj": 4}, alpha_pattern={"o_proj": 6}
    )
    assert config.scale("model.layers.0.self_attn.q_proj") == 2
    assert config.scale("model.layers.0.self_attn.o_proj") == 3
    assert config.scale("model.layers.0.mlp.experts.gate_up_proj") == 4
    assert config.rank_of("model.layers.0.self_attn.no_proj") == 8
    assert LoraConfig(16, 8, use_rslora=True).scale("x") == 2


def lines(**changes):
    return pytest.param(changes.pop("tensors", None), changes.pop("says"), changes, id=str(changes))


Q = pair("model.layers.0.self_attn.q_proj", 4, 40, 40)
ROUTER = "model.layers.0.mlp.gate"


@pytest.mark.parametrize(
    ("tensors", "says", "changes"),
    [
        lines(use_dora=True, says="use_dora = 'True', which is not offered"),
        lines(peft_type="IA3", says="peft_type = 'IA3'"),
        lines(peft_type=None, says="peft_type = 'None'"),
        lines(modules_to_save=["lm_head"], says="modules_to_save"),
        lines(bias="all", says="bias = 'all'"),
        lines(layer_replication=[[0, 2]], says="layer_replication"),
        lines(r=0, says="r must be 1 or more"),
        lines(lora_alpha="8", says="lora_alpha = '8'"),
        lines(r=5, says=r"shapes \[4, 40\] and \[40, 4\], but .* ask for \[5, 40\]"),
        lines(rank_pattern={"q_proj": 3}, says=r"ask for \[3, 40\]"),
        lines(rank_pattern={"(a+)+": 3}, says="at most two repetitions"),
        lines(alpha_pattern={"(": 3}, says="no expression"),
        lines(alpha_pattern={"q_proj": "3"}, says="numbers above 0"),
        lines(target_parameters="all", says="target_parameters = 'all'"),
        lines(tensors=pair("model.layers.9.self_attn.q_proj", 4, 40, 40), says="does not have"),
        lines(tensors=pair("model.layers.0.self_attn.q_a_proj", 4, 40, 40), says="does not have"),
        lines(tensors=pair("model.layers.0.self_attn.q_proj", 4, 44, 40), says="another model"),
        lines(tensors=pair(ROUTER, 4, 40, 6), says="a router"),
        lines(tensors=pair("lm_head", 4, 40, 97), says="the head"),
        lines(tensors={f"{PREFIX}lm_head.weight": draw(4, 4)}, says="no A or B of a linear"),
        lines(
            tensors={f"{PREFIX}model.embed_tokens.lora_embedding_A": draw(4, 97)},
            says="lora_embedding_A",
        ),
        lines(tensors=dict(list(Q.items())[:1]), says=r"no .*q_proj.lora_B.weight"),
        lines(tensors={name: t * float("nan") for name, t in Q.items()}, says="not finite"),
        lines(tensors={name: t.long() for name, t in Q.items()}, says="floating-point"),
        lines(tensors={}, says="no tensors"),
        lines(target_parameters=[], tensors="experts", says="target_parameters"),
        lines(target_parameters=["mlp.experts.down_proj"], tensors="experts", says="2 pairs"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(mixtral, tmp_path, tensors, says, changes):
    if tensors == "experts":
        tensors = fused_experts(mixtral.config, 0, 4)
    folder = write_adapter(tmp_path / "a", Q if tensors is None else tensors, **changes)
    with pytest.raises(ModelFileError, match=says) as error:
        mixtral.adapters.load("a", folder)
    assert "\n" not in str(error.value) and mixtral.adapters.names == []


def test_damaged_folders_and_wrong_names_are_refused(mixtral, tmp_path):
    folder = write_adapter(tmp_path / "a", attention(mixtral.config, 0, 4))
    mixtral.adapters.load("a", folder)
    with pytest.raises(ConfigError, match="is there already"):
        mixtral.adapters.load("a", folder)
    with pytest.raises(ConfigError, match="'b', but the model has 'a'"):
        mixtral(torch.zeros(1, 2, dtype=torch.int64), adapter="b")
    mixtral.adapters.unload("a")
    with pytest.raises(ModelFileError, match="is no folder"):
        mixtral.adapters.load("a", tmp_path / "nothing")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelFileError, match="cut short"):
        mixtral.adapters.load("a", folder)
    weights.unlink()
    with pytest.raises(ModelFileError, match="as safetensors"):
        mixtral.adapters.load("a", folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="not JSON"):
        mixtral.adapters.load("a", folder)


def test_a_written_folder_comes_back(mixtral, tmp_path):
    source = write_adapter(tmp_path / "a", attention(mixtral.config, 1, 4), r=4)
    stored = load_file(source / "adapter_model.safetensors")
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in stored}
    factors = {
        name: Factors(*(stored[f"{PREFIX}{name}.lora_{m}.weight"] for m in "AB")) for name in names
    }
    write_adapter_folder(tmp_path / "b", adapter_config(4, 8, ["q_proj"], False), factors)
    first, second = read(mixtral, source), read(mixtral, tmp_path / "b")
    assert first.linears.keys() == second.linears.keys() and len(first.linears) == 4
    for layer, update in first.linears.items():
        assert update.b_OP.equal(second.linears[layer].b_OP)
        assert update.b_OP.equal(2 * stored_b(stored, layer, mixtral))


def stored_b(stored, layer, model):
    (name,) = (name for name, module in model.decoder.named_modules() if module is layer)
    return stored[f"{PREFIX}model.{name}.lora_B.weight"]


def test_an_adapter_may_be_read_for_a_decoder_without_weights(mixtral, tmp_path):
    from moeyard.moe.folders.families.table import FAMILIES
    from moeyard.moe.models.decoder import Decoder
    from moeyard.moe.without_memory import without_memory

    with without_memory():
        decoder = Decoder(mixtral.config, expert_ids=())
    table = adapter_table(decoder, FAMILIES["mixtral"])
    table.load("a", write_adapter(tmp_path / "a", fused_experts(mixtral.config, 0, 4)))
    with pytest.raises(ModelFileError, match="another model"):
        table.load("b", write_adapter(tmp_path / "b", fused_experts(mixtral.config, 0, 4), r=2))
