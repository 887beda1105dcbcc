"""Replay: the recorded experts, and everything else as the model computes it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, DataError
from moeyard.kernels.router import choose, project_and_choose
from moeyard.kernels.values.choice import ChoiceRule
from moeyard.moe.batch import batch_of
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.documents import batch_of_documents
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.capacity import Capacity
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.losses import auxiliary_losses, global_counts
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.table import router
from moeyard.moe.routers.topk import TopK
from moeyard.moe.routes.identity import identity_of
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.moe.routes.replay import RouteIndex, replay, with_routes
from moeyard.moe.routes.rows import Phase

from cosine_router import Cosine
from small_model import with_router, write_random_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "routes.md"
DEEPSEEK = TopK(
    k=2, score="sigmoid", num_groups=3, top_groups=2, bias_update_rate=0.1, scale=2.5,
    sequence_balance_loss=0.1, logit_bias=True,
)  # fmt: skip
ROUTERS = {
    "topk": TopK(k=2, z_loss=0.1),
    "deepseek": DEEPSEEK,
    "unnormalized": TopK(k=3, renormalize=False, balance_over="model"),
    "pregated": TopK(k=2, lookahead="previous_block"),
    "preattention": TopK(k=2, lookahead="attention_input"),
    "hash": Hash(k=2),
}
TIGHT = {"factor": 0.75}
SECONDS = {"noise": "none", "load_loss": 0, "balance_counts": "first", "balance_loss": 0.1}
OTHERS = {
    "capacity": TopK(k=2, capacity=TIGHT, bias_update_rate=0.1, entropy_loss=0.1),
    "capacity_groups": DEEPSEEK.model_copy(update={"capacity": Capacity(drop="probability")}),
    "rounded": TopK(k=2, round_rows_to=8, scale=1.5, z_loss=0.1),
    "rounded_unnormalized": TopK(k=3, round_rows_to=16, renormalize=False),
    "noisy": router("noisy", k=2),
    "vmoe": router("noisy", k=2, noise="constant", capacity=TIGHT | {"drop": "batch_priority"}),
    "gshard": router("noisy", **SECONDS, second_expert="random", capacity=TIGHT),
    "threshold": router("noisy", **SECONDS, second_expert="threshold", second_threshold=0.45),
    "switch": router("noisy", k=1, noise="none", load_loss=0, jitter=0.1, capacity=TIGHT),
    "expert_choice": router("expert_choice", k=2),
    "mutual_choice": router("expert_choice", choice="mutual", score="sigmoid"),
    "base": router("base"),
    "sinkhorn": router("sinkhorn"),
    "sinkhorn_k2": router("sinkhorn", k=2),
    "null_experts": router("null_experts", k=3, num_null=3),
    "null_experts_all": router("null_experts", k=3, num_null=2, renormalize_over="all"),
    "local_search": router("local_search", search_steps=3, router={"kind": "noisy"}),
    "local_search_capacity": router(
        "local_search", search_steps=3, router={"kind": "topk", "capacity": TIGHT}
    ),
}
DROPS = {"capacity", "capacity_groups", "vmoe", "gshard", "threshold", "switch"}
DROPS |= {"local_search_capacity"}


def decoder_with(router, recompute=False, dtype=torch.float32):
    decoder = Decoder(with_router(router), recompute=recompute)
    initialize(decoder, 5)
    for gate in decoder.routers():
        if router.kind == "local_search":
            gate.step.fill_(3)
            gate.order_E.copy_(torch.tensor([2, 4, 0, 5, 1, 3]))
        if getattr(gate, "e_score_correction_bias", None) is not None:
            gate.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, 6))
    return decoder.to(dtype)


def ids_of(batch=2, length=11):
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(1))


def experts_of(routings):
    width = max(routing.experts_TK.shape[1] for routing in routings)
    pads = [(0, width - routing.experts_TK.shape[1]) for routing in routings]
    both = zip(routings, pads, strict=True)
    return torch.stack([pad(routing.experts_TK, by, value=-1) for routing, by in both], dim=1)


def loss_and_gradients(decoder, batch):
    decoder.train()
    output = decoder(batch)
    logits_TV = decoder.logits(output.hidden_TD)
    auxiliary = auxiliary_losses(output.routings, decoder.routers(), lambda counts: counts)
    loss = torch.nn.functional.cross_entropy(logits_TV, batch.ids_T) + auxiliary.total
    decoder.zero_grad()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, output.routings


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        *((name, False) for name in (*ROUTERS, *OTHERS)),
        *((name, True) for name in ("topk", "pregated", "gshard", "rounded", "null_experts_all")),
    ],
)
def test_replaying_its_own_choice_changes_no_bit_of_loss_and_gradients(name, recompute):
    decoder = decoder_with((ROUTERS | OTHERS)[name], recompute)
    batch = batch_of_documents(ids_of(), 7)
    loss, gradients, routings = loss_and_gradients(decoder, batch)
    replayed = with_routes(batch, decoder.config, experts_of(routings))
    again, same, replays = loss_and_gradients(decoder, replayed)
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[n], same[n]) for n in gradients)
    for a, b in zip(routings, replays, strict=True):
        assert torch.equal(a.counts_E, b.counts_E)
        width = a.weights_TK.shape[1]
        present_TK = a.experts_TK >= 0
        assert torch.equal(a.weights_TK[present_TK], b.weights_TK[:, :width][present_TK])
        assert a.extra_counts.keys() == b.extra_counts.keys()
        assert all(torch.equal(a.extra_counts[n], b.extra_counts[n]) for n in a.extra_counts)
        if "rounded" in name:
            assert (a.experts_TK[:, :-2] < 0).any() and (a.experts_TK[:, -2:] >= 0).any()
    counts = global_counts(routings, lambda counts: counts)
    dropped = [gate.dropped(of) for gate, of in zip(decoder.routers(), counts, strict=True)]
    assert all(number > 0 for number in dropped) == (name in DROPS)


@pytest.mark.parametrize("recompute", [False, True])
def test_other_experts_are_visited_and_counted_and_routers_still_learn(recompute):
    decoder = decoder_with(TopK(k=2), recompute)
    batch = batch_of_documents(ids_of(), 7)
    loss, gradients, routings = loss_and_gradients(decoder, batch)
    given_TLK = (experts_of(routings) + 1) % 6
    given_TLK[3] = -1
    given_TLK[4, :, 0] = -1
    replayed = with_routes(batch, decoder.config, given_TLK)
    other, others, replays = loss_and_gradients(decoder, replayed)
    assert not torch.equal(loss, other)
    for layer, routing in enumerate(replays):
        assert torch.equal(routing.experts_TK, given_TLK[:, layer])
        ids = given_TLK[:, layer]
        assert torch.equal(routing.counts_E, torch.bincount(ids[ids >= 0], minlength=6))
        assert (routing.weights_TK[3] == 0).all() and routing.weights_TK[4, 0] == 0
    gate = "layers.0.mlp.gate.weight"
    assert others[gate].abs().max() > 0 and not torch.equal(others[gate], gradients[gate])


RULES = [
    ChoiceRule(k=2),
    ChoiceRule(k=3, renormalize=False, scale=1.5),
    ChoiceRule(k=2, score="sigmoid", scale=2.5, num_groups=2, top_groups=1),
]


@pytest.mark.parametrize("rule", RULES, ids=["softmax", "unnormalized", "groups"])
def test_weights_and_gradients_are_the_rules_at_the_given_experts(rule):
    draw = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(50, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    given_TK = torch.rand(50, 6, generator=draw).topk(4).indices.int()  # wider than k, any group
    given_TK[7:12, 2:] = -1
    found = choose(logits_TE, None, None, rule, True, given_TK=given_TK)
    scores_TE = logits_TE.sigmoid() if rule.score == "sigmoid" else logits_TE.softmax(dim=1)
    expected_TK = scores_TE.gather(1, given_TK.clamp(min=0).long()) * (given_TK >= 0)
    if rule.renormalize:
        expected_TK = expected_TK / expected_TK.sum(dim=1, keepdim=True)
    expected_TK = expected_TK * rule.scale
    assert torch.allclose(found.weights_TK, expected_TK, rtol=1e-12, atol=0)
    slopes_TK = torch.randn(50, 4, generator=draw, dtype=torch.float64)
    actual, wanted = (
        torch.autograd.grad((w * slopes_TK).sum(), logits_TE, retain_graph=True)[0]
        for w in (found.weights_TK, expected_TK)
    )
    assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-14)
    own = choose(logits_TE, None, None, rule, True, "torch")
    again = choose(logits_TE, None, None, rule, True, given_TK=own.experts_TK)
    for a, b in zip((*own[:3], *own.sums), (*again[:3], *again.sums), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("no_gradients", "instruction_set")
@pytest.mark.parametrize("rule", RULES, ids=["softmax", "unnormalized", "groups"])
def test_the_kernel_weighs_given_experts_as_it_weighs_its_own(rule):
    draw = torch.Generator().manual_seed(0)
    x_TD, weight_ED = torch.randn(50, 24, generator=draw), torch.randn(6, 24, generator=draw)
    bias_E = torch.linspace(-0.3, 0.3, 6)
    own = project_and_choose(x_TD, weight_ED, None, bias_E, rule)
    again = project_and_choose(x_TD, weight_ED, None, bias_E, rule, own.experts_TK)
    assert all(torch.equal(a, b) for a, b in zip(own[:3], again[:3], strict=True))
    given_TK = torch.rand(50, 6, generator=draw).topk(4).indices
    given_TK[7:12, 2:] = -1
    found = project_and_choose(x_TD, weight_ED, None, bias_E, rule, given_TK)
    expected = choose(x_TD @ weight_ED.T, None, None, rule, False, given_TK=given_TK)
    assert torch.equal(found.experts_TK, given_TK.int())
    assert torch.equal(found.counts_E, expected.counts_E)
    assert torch.allclose(found.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-7)
    for bad in (6, -2):
        given_TK[3, 1] = bad
        with pytest.raises(ValueError, match=f"expert id {bad} is outside"):
            project_and_choose(x_TD, weight_ED, None, bias_E, rule, given_TK)
        with pytest.raises(ValueError, match=f"expert id {bad} is outside"):
            choose(x_TD @ weight_ED.T, None, None, rule, False, given_TK=given_TK)


def test_the_order_of_a_rows_experts_changes_only_rounding():
    decoder = decoder_with(TopK(k=3), dtype=torch.float32).eval()
    batch = batch_of(list(ids_of()))
    with torch.inference_mode():
        own = decoder(batch)
        reversed_TLK = experts_of(own.routings).flip(-1)
        other = decoder(with_routes(batch, decoder.config, reversed_TLK))
    assert torch.allclose(own.hidden_TD, other.hidden_TD, atol=1e-5)


@pytest.fixture(scope="module", params=["topk", "deepseek", "pregated", "hash"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / request.param
    write_random_model(path, with_router(ROUTERS[request.param]))
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_recorded_generation_replays_with_equal_logits(folder, tmp_path, dtype):
    model = moeyard.load(folder, dtype=dtype)
    with recording(model.decoder, tmp_path / "a.routes"):
        ids_BT = model.generate(ids_of(), 6, temperature=1, seed=3, ignore_eos=True)
    routes = RouteFile(tmp_path / "a.routes").read()
    assert len(routes) == 2 * (11 + 6 - 1), "the last token was never read"
    assert (routes.phases_N == Phase.PREFILL).sum() == 22 and routes.steps_N.max() == 5
    assert routes.tokens_N[:22].tolist() == ids_of().flatten().tolist()
    with torch.inference_mode():
        caches, others = ([model.decoder.new_cache(20) for _ in ids_BT] for _ in "ab")
        for first, last in ((0, 11), *((n, n + 1) for n in range(11, 16))):
            parts = [row[first:last] for row in ids_BT]
            expected = model.decoder(batch_of(parts, caches))
            found = replay(model.decoder, batch_of(parts, others), routes, [0, 1])
            assert torch.equal(found.hidden_TD, expected.hidden_TD)
            for a, b in zip(found.routings, expected.routings, strict=True):
                assert torch.equal(a.experts_TK, b.experts_TK)
                assert torch.equal(a.weights_TK, b.weights_TK)


def test_offloaded_experts_replay_too(folder, tmp_path):
    model = moeyard.load(folder, expert_memory="50%")
    with recording(model.decoder, tmp_path / "a.routes"):
        expected = model(ids_of())
    routes = RouteFile(tmp_path / "a.routes").read()
    resident = moeyard.load(folder)
    assert identity_of(resident.config, resident.decoder) == identity_of(
        model.config, model.decoder
    ), "the memory for experts is no part of a model"
    for decoder in (model.decoder, resident.decoder):
        with torch.inference_mode():
            output = replay(decoder, batch_of(list(ids_of())), routes, [0, 1])
            assert torch.equal(decoder.logits(output.hidden_TD).view_as(expected), expected)


def test_rows_that_were_not_recorded_and_other_tokens_get_a_sentence(folder, tmp_path):
    model = moeyard.load(folder)
    with recording(model.decoder, tmp_path / "a.routes"):
        model(ids_of())
    routes = RouteFile(tmp_path / "a.routes").read()
    index, batch = RouteIndex(routes), batch_of(list(ids_of()))
    index.experts_of(batch, [0, 1])
    for changed, sequences, said in (
        (ids_of(), [0, 2], "no row for position 0 of sequence 2"),
        (ids_of(length=12), [0, 1], "have token|no row for position 11 of sequence"),
        (ids_of().flip(0), [0, 1], "position 0 of sequence 0, but the batch has"),
    ):
        with pytest.raises(DataError, match=said):
            index.experts_of(batch_of(list(changed)), sequences)
    with pytest.raises(DataError, match="have no rows"):
        RouteIndex(routes.select(slice(0, 0)))
    experts_TLK = index.experts_of(batch, [0, 1])
    with pytest.raises(DataError, match=r"shape \[22, 1, \d\]; give .* = \[22, 2, K\]"):
        with_routes(batch, model.config, experts_TLK[:, :1])
    experts_TLK[5, 1, 0] = 6
    with pytest.raises(DataError, match="name expert 6, but there are 6; ids go from 0 to 5"):
        with_routes(batch, model.config, experts_TLK)


def test_a_router_that_cannot_replay_says_so():
    gate = Cosine(k=2).build(moeyard.RouterSizes(8, 4))
    rows = RouterInput(torch.randn(3, 8))
    with pytest.raises(ConfigError, match="cannot replay recorded routes; use another"):
        gate.route_to(rows, torch.zeros(3, 2, dtype=torch.int32))


def test_the_identity_tells_weights_and_architectures_apart(folder):
    model = moeyard.load(folder)
    before = identity_of(model.config, model.decoder)
    assert before == identity_of(model.config, moeyard.load(folder).decoder)
    model.decoder.lm_head.weight[0, 0] += 1
    after = identity_of(model.config, model.decoder)
    assert after.architecture == before.architecture and after.weights != before.weights
    router = model.config.moe.router.model_copy(update={"k": 1})
    other = model.config.model_copy(
        update={"moe": model.config.moe.model_copy(update={"router": router})}
    )
    assert identity_of(other).architecture != before.architecture


def test_the_code_of_the_page_runs(model_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, "docs/routes.md", "exec"), found)
    assert found["logits_TV"].shape == (len(found["routes"]), 257)
    assert torch.equal(found["y_TD"], found["same_TD"])
    assert "6 (0, 2)" in capsys.readouterr().out


def test_commands_record_show_and_replay(model_folder, tmp_path, capsys):
    file = str(tmp_path / "a.routes")
    options = ["--max-new-tokens", "8", "--ignore-eos", "--seed", "1", "--record-routes", file]
    assert main(["generate", str(model_folder), "def f(", *options]) == 0
    assert main(["trace", "show", file]) == 0
    shown = capsys.readouterr().out
    assert "program=generate" in shown and "prefill=6 decode=7" in shown
    assert main(["trace", "compare", str(model_folder), file]) == 0
    told = capsys.readouterr().out
    assert "texts=1 rows=13 same_weights=True same_choices=1.0 same_rows=1.0" in told
    assert "largest_logit_difference=0.0 same_next_token=1.0" in told
    data = (tmp_path / "a.routes").read_bytes()
    (tmp_path / "a.routes").write_bytes(data[:-5])
    assert main(["trace", "show", "--json", file]) == 0
    assert "warning: " in capsys.readouterr().err
    assert main(["generate", str(model_folder), "a", "--record-routes", f"{tmp_path}/no/a"]) == 2
    message = capsys.readouterr().err
    assert "cannot be written (No such file or directory); record into another file." in message
