"""Blocks: the papers' formulas, the plain model as a special case, folders, caches, bad input.

What blocks do between ranks and stages is in tests/parallel, test_exact_rows.py has bits of rows.
"""

import math

import pytest
import torch
import yaml

import moeyard
from moeyard.configuration import validate_config
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.blocks.adam import Adam
from moeyard.moe.blocks.block import Place
from moeyard.moe.blocks.momentum import Momentum
from moeyard.moe.blocks.residual import Residual
from moeyard.moe.blocks.robust import Robust
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.families.table import FAMILIES, family_for
from moeyard.moe.folders.json_file import read_json
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.topk import TopK
from moeyard.serving.engine.engine import Engine
from moeyard.serving.loading import open_model

from small_model import CONFIG, write_decoder
from test_engine import latin, request, run

BLOCKS = {
    "residual": Residual(),
    "momentum": Momentum(mu=0.6, gamma=0.8),
    "adam": Adam(),
    "adam_twice": Adam(adam_layers=2, rate=0.2, beta1=0.8, beta2=0.9, mu=0.5, gamma=0.7),
    "adam_everywhere": Adam(adam_layers=None, beta2=0.95, decay=0.1),
    "robust": Robust(condition=4.0, rho=0.7),
}
BLOCK = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
PLAIN = {
    "momentum": Momentum(mu=0, gamma=1),
    "robust": Robust(mu=0, gamma=1, alpha=0),
}
"""Blocks with which nothing may change."""


def config(block, **options) -> ModelConfig:
    router = TopK(k=2, z_loss=0.1, **options)
    return ModelConfig(
        vocab_size=50,
        d_model=16,
        num_layers=5,
        num_heads=2,
        d_ff=24,
        dense_layers=(2,),
        moe=MoEConfig(num_experts=5, d_expert=12, router=router, block=block),
    )


def decoder(block, recompute=False, **options) -> Decoder:
    model = Decoder(config(block, **options), recompute=recompute)
    initialize(model, 3)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("fc2"):
            parameter.data *= 4  # so that steps of blocks matter
    return model


IDS = torch.arange(22).view(2, 11) * 7 % 50


class Iteration:
    """The formulas of a paper, one MoE layer after the other."""

    def __init__(self, block) -> None:
        self.block, self.layer = block, 0
        self.m = self.p = self.v = 0.0

    def read(self, x):
        """Return what the experts' norm reads."""
        alpha = self.block.rates().alpha if self.block.kind == "robust" else 0
        return x + alpha * self.m

    def step(self, x, y):
        """Return the residual stream after the layer."""
        b, self.layer = self.block, self.layer + 1
        if b.kind == "residual":
            return x + y
        mu, gamma = b.rates()[:2] if b.kind == "robust" else (b.mu, b.gamma)
        self.m = mu * self.m + gamma * y
        if b.kind == "adam" and self.layer <= (b.adam_layers or math.inf):
            self.p = b.beta1 * self.p + (1 - b.beta1) * y
            self.v = b.beta2 * self.v + (1 - b.beta2) * y**2
            return x - b.decay * x + b.rate * self.p / (self.v + b.epsilon).sqrt()
        return x + self.m


@BLOCK
def test_layers_make_the_steps_of_the_paper(block):
    model = decoder(block).double()
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for index, layer in enumerate(model.layers):
        layer.mlp.register_forward_hook(
            lambda _, given, found, at=index: seen.update(
                {("in", at): given[0], ("mlp", at): found[0] if at != 2 else found}
            )
        )
        layer.self_attn.register_forward_hook(
            lambda _, given, found, at=index: seen.update({("attention", at): found})
        )
    hidden = model(batch_of_rows(IDS)).hidden_TD
    x, steps = model.embed_tokens(IDS.flatten()), Iteration(block)
    for index, layer in enumerate(model.layers):
        x = x + seen["attention", index]
        read = x if index == 2 else steps.read(x)
        close(seen["in", index], layer.post_attention_layernorm(read))
        x = x + seen["mlp", index] if index == 2 else steps.step(x, seen["mlp", index])
    close(hidden, model.norm(x))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_every_block_is_another_function():
    hidden = [decoder(block)(batch_of_rows(IDS)).hidden_TD for block in BLOCKS.values()]
    for at, one in enumerate(hidden):
        assert all((one - other).abs().max() > 0.05 for other in hidden[:at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", PLAIN.values(), ids=PLAIN)
def test_without_momentum_it_is_the_plain_model_bit_for_bit(block, dtype):
    """Rows, choices and all gradients; a residual stream in bf16 meets a state in fp32."""
    found = []
    for kind in (Residual(), block):
        model = decoder(kind).to(dtype)
        output = model(batch_of_rows(IDS))
        loss = model.logits(output.hidden_TD).logsumexp(1).sum()
        (loss + sum(r.extras["z_sum"] for r in output.routings)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((output.hidden_TD, [r.weights_TK for r in output.routings], gradients))
    (x, weights, gradients), (x_too, weights_too, gradients_too) = found
    assert torch.equal(x, x_too)
    assert all(map(torch.equal, weights, weights_too))
    for name, gradient in gradients.items():
        assert torch.equal(gradients_too[name], gradient), name


@pytest.mark.parametrize("block", PLAIN.values(), ids=PLAIN)
def test_so_it_is_the_same_architecture_and_exported_as_the_plain_one(block):
    assert config(block).architecture() == config(Residual()).architecture()
    assert family_for(config(block)).model_type == "qwen3_moe"
    other = Momentum(mu=0.1, gamma=1)
    assert config(other).architecture() != config(Residual()).architecture()


def test_rates_of_the_robust_method_follow_from_k_and_rho():
    """The closed forms of Cyrus et al., and the same block from numbers given one by one."""
    k, rho, lipschitz = 10, 0.8, 2.0
    by_rule = Robust(condition=k, rho=rho, lipschitz=lipschitz)
    rates = by_rule.rates()
    assert rates.gamma == pytest.approx(k * (1 - rho) ** 2 * (1 + rho) / lipschitz)
    assert rates.mu == pytest.approx(k * rho**3 / (k - 1))
    assert rates.alpha == pytest.approx(rho**3 / ((k - 1) * (1 - rho) ** 2 * (1 + rho)))
    given = Robust(mu=rates.mu, gamma=rates.gamma, alpha=rates.alpha)
    assert given.architecture() == by_rule.architecture()
    without = Robust(mu=0.4, gamma=0.9, alpha=0)
    assert without.architecture() == Momentum(mu=0.4, gamma=0.9).architecture()


@BLOCK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(block, dtype):
    """Through five MoE layers, with widths that fill no vector of any instruction set."""
    x_TD, *y_LTD = torch.randn(6, 9, 37, generator=torch.Generator().manual_seed(0)).to(dtype)

    def joined(rows: slice) -> torch.Tensor:
        x, state, found = x_TD[rows], (), []
        for index, y in enumerate(y_LTD):
            place = Place(index, 5)
            assert len(state) == block.num_carried(place)
            found.append(block.experts_read(x, state))
            x, state = block.join(x, y[rows], state, place)
        return torch.stack([*found, x])

    whole = joined(slice(None))
    assert whole.dtype == dtype
    for at in range(9):
        assert torch.equal(joined(slice(at, at + 1)), whole[:, at : at + 1])


@pytest.mark.parametrize("block", ["adam_twice", "robust"])
def test_recompute_changes_no_bit(block):
    """Also for routers that read what the experts before read."""
    found = []
    for recompute in (False, True, "experts"):
        model = decoder(BLOCKS[block], recompute, lookahead="previous_block")
        output = model(batch_of_rows(IDS))
        (output.hidden_TD.square().sum() + output.routings[-1].extras["z_sum"]).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.fixture(scope="module", params=["adam_twice", "robust"])
def folder(request, tmp_path_factory):
    """A folder of a small model with a block, and the decoder in it."""
    moe = CONFIG.moe.model_copy(update={"block": BLOCKS[request.param]})
    options = {"moe": moe, "num_layers": 4, "dense_layers": (1,)}
    model = Decoder(CONFIG.model_copy(update=options))
    initialize(model, 5)
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
    path = tmp_path_factory.mktemp("block") / "model"
    write_decoder(path, model, eos_id=256)
    return path, model.eval()


@torch.inference_mode()
def test_a_folder_says_why_it_is_ours_and_brings_the_model_back(folder):
    path, model = folder
    values = read_json(path / "config.json")
    kind = model.config.moe.block.kind
    assert values["model_type"] == "moeyard"
    assert values["why_moeyard"] == (
        f"moe.block.kind is {kind}, where qwen3_moe has residual, and no other family of "
        "transformers expresses it."
    )
    loaded = moeyard.load(path)
    assert loaded.decoder.config.architecture() == model.config.architecture()
    ids = torch.arange(40).view(2, 20) * 5 % 257
    expected = model.logits(model(batch_of_rows(ids)).hidden_TD)
    assert torch.equal(loaded(ids).flatten(0, 1), expected)


def test_offloaded_experts_and_an_engine_give_the_same_answers(folder):
    """A third of the experts in memory, whole and in steps, alone and among others."""
    path, _ = folder
    resident, _ = open_model(path, "bfloat16")
    offloaded, store = open_model(path, "bfloat16", expert_memory="34%")
    ids = torch.arange(60).view(2, 30) * 11 % 256
    assert torch.equal(resident(ids), offloaded(ids))
    expected = [resident.generate(row[None], 12, temperature=0)[0, 30:] for row in ids]
    engine = Engine(offloaded, latin, store, max_num_seqs=2, prefill_chunk=7)
    asked = [request(str(at), row.tolist(), max_tokens=12) for at, row in enumerate(ids)]
    texts, _, _ = run(engine, asked, stagger=2)
    for at, tokens in enumerate(expected):
        stop = (tokens == 256).nonzero()
        assert texts[str(at)] == latin(tokens[: int(stop[0])] if len(stop) else tokens)


def test_families_of_transformers_say_what_they_lack():
    reasons = [
        FAMILIES[name].why_not(config(Momentum()))
        for name in ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe")
    ]
    assert all(reason is not None for reason in reasons)


def test_a_configuration_from_before_blocks_means_the_plain_residual():
    values = config(Residual()).model_dump(mode="json")
    del values["moe"]["block"]
    assert ModelConfig.model_validate(values) == config(Residual())


WRONG = {
    "{kind: momentums}": "block.kind is 'momentums'; did you mean 'momentum'?",
    "{mu: 0.5}": "block.kind is missing; use one of the known kinds.",
    "{kind: momentum, mu: 1}": "block.mu: it is 1, but should be less than 1.",
    "{kind: momentum, gamma: 0}": "block.gamma: it is 0, but should be greater than 0.",
    "{kind: residual, mu: 0.5}": "block.mu is not a known key",
    "{kind: adam, adam_layers: 0}": "block.adam_layers: it is 0, but should be greater than or",
    "{kind: adam, beta2: 1}": "block.beta2: it is 1, but should be less than 1.",
    "{kind: robust, rho: 0.5}": "block: rho is 0.5, but with condition = 10.0 the method converges "
    "for 0.6838 to 0.9 only; use a value between.",
    "{kind: robust, condition: 1}": "block.condition: it is 1, but should be greater than 1.",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_block_that_cannot_be_is_refused_in_a_sentence(text):
    values = {"num_experts": 4, "d_expert": 8, "block": yaml.safe_load(text)}
    with pytest.raises(ConfigError) as raised:
        validate_config(MoEConfig, values)
    assert WRONG[text] in str(raised.value) and "\n" not in str(raised.value)
