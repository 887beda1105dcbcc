"""Units of experts and the features of a text that single ones tell."""

import pytest
import torch

from moeyard.errors import ConfigError, DataError
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.sparsity import Sparsity
from moeyard.serving.evaluation.byte_features import byte_features
from moeyard.serving.evaluation.unit_coverage import Units, coverage, unit_values
from moeyard.serving.loading import load

from small_model import CONFIG, write_decoder

TEXT = b'The cat, they said. "Go" (on)\n\nANNA:\nrunning all day'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    moe = MoEConfig(num_experts=4, d_expert=20, activation="relu", router=Sparsity())
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe}))
    initialize(decoder, 5)
    path = tmp_path_factory.mktemp("units") / "m"
    write_decoder(path, decoder, eos_id=256)
    return path


def test_a_layer_is_its_units_times_one_wide_matrix(folder):
    model, outputs = load(folder), []
    for _, layer in model.decoder.moe_layers():
        layer.experts.register_forward_hook(lambda _, __, y_ND: outputs.append(y_ND))
    units = unit_values(model, list(TEXT), length=len(TEXT))
    for (_, layer), one, y_ND in zip(model.decoder.moe_layers(), units, outputs, strict=True):
        down_DU = layer.experts.fc2.transpose(0, 1).flatten(1)
        torch.testing.assert_close(one.values_NU @ down_DU.T, y_ND, rtol=1e-4, atol=1e-6)
        assert one.values_NU.shape == (len(TEXT), 4 * 20)
        computed = len(TEXT) * 2 * 20
        assert one.num_computed == computed and 0.2 < one.zero_share < 0.8
        assert one.zero_share == pytest.approx(1 - int((one.values_NU > 0).sum()) / computed)


def test_experts_that_are_not_in_memory_are_refused(folder):
    with pytest.raises(ConfigError, match="units are read from plain ones in memory"):
        unit_values(load(folder, expert_memory="50%"), list(TEXT))


def test_a_token_uses_as_many_units_as_have_the_same_size():
    values = torch.zeros(3, 10)
    values[0, :4], values[1, 2] = -2.0, 7.0  # the third token uses none
    assert Units(values, 30).effective_units == pytest.approx((4 + 1) / 2)
    assert Units(values, 30).zero_share == pytest.approx(25 / 30)


def test_a_unit_that_is_the_feature_covers_it_with_either_sign_and_any_scale():
    generator = torch.Generator().manual_seed(0)
    feature = torch.rand(400, generator=generator) < 0.2
    noise = torch.randn(400, 5, generator=generator)
    for unit in (feature.float(), -3 * feature.float(), torch.where(feature, 2.0, 0.7)):
        found = coverage(torch.cat([noise, unit[:, None]], dim=1), {"it": feature})
        assert found == {"it": 1.0}
    assert coverage(noise, {"it": feature})["it"] < 0.5


def test_a_unit_that_tells_a_feature_in_the_first_half_only_gets_the_second_halfs_score():
    feature = torch.arange(400) % 4 == 0
    unit = feature.float()
    unit[200:] = (torch.arange(200) % 4 == 1).float()
    assert coverage(unit[:, None], {"it": feature}) == {"it": 0.0}


def test_rare_features_are_left_out_and_a_text_without_others_is_refused():
    rare = torch.zeros(100, dtype=torch.bool)
    rare[::30] = True
    values, often = torch.randn(100, 3), torch.arange(100) % 3 == 0
    assert list(coverage(values, {"rare": rare, "often": often})) == ["often"]
    with pytest.raises(DataError, match="give a longer text"):
        coverage(values, {"rare": rare})


def test_features_say_what_their_names_say():
    found = byte_features(TEXT)

    def where(name):
        return "".join(chr(byte) for byte, true in zip(TEXT, found[name], strict=True) if true)

    assert where("upper-case letter") == "TGANNA"
    assert where("first letter of a word") == "TctsGoArad"
    assert where("fourth letter of a word") == "ydAn"
    assert where("seventh letter of a word or later") == "g"
    assert where("first letter of a sentence") == ""  # a quote stands between
    assert where("two capitals in a row") == "NNA"
    assert where("the same letter twice") == "Nnl"
    assert where("first of a line") == "T\nAr"
    assert where("empty line") == "\n"
    assert where("first line of a paragraph") == 'The cat, they said. "Go" (on)\nANNA:\n'
    assert where("in quotes") == '"Go' and where("in brackets") == "(on"
    assert where("after a comma and a space") == " "
    assert where("ends in ing") == "g" and where("the word so far is the") == "ee"
    sentences = byte_features(b"One. Two! three")["first letter of a sentence"]
    assert sentences.nonzero().flatten().tolist() == [5, 10]


def test_features_are_known_from_the_text_so_far():
    whole = byte_features(TEXT)
    for end in range(1, len(TEXT)):
        for name, true in byte_features(TEXT[:end]).items():
            assert true.equal(whole[name][:end]), name
