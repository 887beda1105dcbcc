"""Routers with a bias on the logits (gpt-oss): their formula, and where the bias is written.

T tokens, D model width, E experts.
"""

import pytest
import torch

from moeyard.kernels.cpu import library
from moeyard.kernels.router import project_and_choose
from moeyard.moe.config.attention import AttentionConfig
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK, TopKRouter

D, E, K = 8, 7, 3
RULES = {
    "gpt_oss": {},
    "softmax_as_it_is": {"renormalize": False, "scale": 2.0},
    "sigmoid": {"score": "sigmoid"},
    "balanced": {"score": "sigmoid", "bias_update_rate": 0.01},
}


def gate(**options) -> TopKRouter:
    torch.manual_seed(1)
    router = TopK(k=K, logit_bias=True, **options).build(RouterSizes(D, E))
    with torch.no_grad():
        router.bias.copy_(torch.linspace(1.5, -1.5, E))
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, E))
    return router


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(40, D, dtype=torch.float64, generator=generator)


def by_formula(router: TopKRouter, x_D: torch.Tensor, bias_E: torch.Tensor) -> dict[int, float]:
    """Return expert -> weight of one token."""
    config, logits_E = router.config, router.weight.double() @ x_D + bias_E.double()
    if config.score == "sigmoid":
        scores = [1 / (1 + float((-logit).exp())) for logit in logits_E]
    else:
        total = sum(float(logit.exp()) for logit in logits_E)
        scores = [float(logit.exp()) / total for logit in logits_E]
    to_choose_by = list(scores)
    if router.e_score_correction_bias is not None:
        added = router.e_score_correction_bias.tolist()
        to_choose_by = [score + more for score, more in zip(scores, added, strict=True)]
    chosen = sorted(range(E), key=lambda e: -to_choose_by[e])[:K]
    divisor = sum(scores[e] for e in chosen) if config.renormalize else 1.0
    return {e: config.scale * scores[e] / divisor for e in chosen}


@torch.no_grad()
@pytest.mark.parametrize("options", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_bias_moves_choices_and_weights_as_the_formula_says(dtype, options, monkeypatch):
    router, x = gate(**options).to(dtype), rows().to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = [by_formula(router, row, router.bias) for row in x.double()]
    without = [by_formula(router, row, torch.zeros(E)) for row in x.double()]
    assert any(set(a) != set(b) for a, b in zip(expected, without, strict=True))
    found = [router.train().route(RouterInput(x)), router.eval().route(RouterInput(x))]
    monkeypatch.setattr(library, "_loaded", library.Library(None, "left out"))
    found.append(router.route(RouterInput(x)))
    for routing in found:
        for token, wanted in enumerate(expected):
            assert routing.experts_TK[token].tolist() == list(wanted)
            weights = routing.weights_TK[token].tolist()
            assert weights == pytest.approx(list(wanted.values()), rel=tolerance)


@pytest.mark.parametrize("options", RULES.values(), ids=list(RULES))
def test_gradients_of_all_outputs_are_those_of_finite_differences(options):
    router, x = gate(**options).double(), rows()[:6].requires_grad_()

    def outputs(x, *_):  # gradcheck moves the parameters where they are
        routing = router.route(RouterInput(x))
        return routing.weights_TK, routing.extras["probability_sums_E"], routing.extras["z_sum"]

    assert torch.autograd.gradcheck(outputs, (x, router.weight, router.bias))


@torch.no_grad()
@pytest.mark.skipif(library.load().functions is None, reason=library.load().state)
def test_a_rows_bits_depend_on_no_other_row_and_its_type_is_not_the_routers():
    router, x = gate().eval(), rows().bfloat16()
    together = router.route(RouterInput(x))
    assert project_and_choose(x, router.weight, router.bias, None, router.rule) is not None
    assert together.weights_TK.dtype == router.bias.dtype == torch.float32
    for token in range(len(x)):
        alone = router.route(RouterInput(x[token : token + 1]))
        assert torch.equal(alone.weights_TK, together.weights_TK[token : token + 1])


def model(num_experts: int = E, **router) -> ModelConfig:
    moe = MoEConfig(num_experts=num_experts, d_expert=4, router=TopK(k=K, **router))
    return ModelConfig(vocab_size=16, d_model=D, num_layers=1, num_heads=2, moe=moe)


def test_biases_and_sinks_start_at_zero():
    config = model(logit_bias=True)
    config = config.model_copy(update={"attention": AttentionConfig(sinks=True)})
    decoder = Decoder(config)
    fresh = (decoder.layers[0].mlp.gate.bias, decoder.layers[0].self_attn.sinks)
    for part in fresh:
        torch.nn.init.ones_(part)
    initialize(decoder, seed=0)
    assert not any(part.any() for part in fresh)
    assert torch.equal(decoder.norm.weight, torch.ones(D))


def test_qwen3_has_no_word_for_it():
    family = FAMILIES["qwen3_moe"]
    assert family.why_not(model()) is None
    reason = family.why_not(model(logit_bias=True))
    assert reason == "moe.router.logit_bias is True, where qwen3_moe has False"
    assert (
        family.why_not(model(group_score="max")) is None
    )  # with one group there is nothing to rank


def test_a_configuration_from_before_these_fields_means_their_defaults():
    groups = {"num_experts": 8, "num_groups": 2, "top_groups": 1}
    now = model(logit_bias=False, group_score="top2", **groups)
    before = now.model_dump(mode="json")
    for name in ("logit_bias", "group_score"):
        del before["moe"]["router"][name]
    assert ModelConfig.model_validate(before).architecture() == now.architecture()
    for other in (model(logit_bias=True, **groups), model(group_score="max", **groups)):
        assert other.architecture() != now.architecture()
