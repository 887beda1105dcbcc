"""The parts that routers share: draws, lines of choices, shares of whole-batch losses, the list."""

from pathlib import Path

import pytest
import torch

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError
from moeyard.moe.routers.causal import check_causal
from moeyard.moe.routers.draws import draw_rows, sequence_keys
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.split_rows import choices_of, split_rows
from moeyard.moe.routers.table import ROUTERS
from moeyard.moe.routers.whole_batch import from_fixed_point, share_of, to_fixed_point


def draw(ids_T, lengths, step=0, stream=0):
    keys = sequence_keys(ids_T, lengths)
    given = RouterInput(ids_T=ids_T, lengths=lengths, draw_keys=keys)
    return draw_rows(
        given, len(ids_T), step, stream, lambda rows, g: torch.rand(rows, 3, generator=g)
    )


def test_draws_depend_on_the_sequence_the_step_and_the_stream_only():
    ids_T = torch.tensor([5, 6, 7, 9, 9, 1])
    whole = draw(ids_T, (4, 2))
    assert torch.equal(whole[4:], draw(ids_T[4:], (2,)))
    assert torch.equal(whole, draw(ids_T, (4, 2)))
    others = [draw(ids_T, (4, 2), step=1), draw(ids_T, (4, 2), stream=1)]
    others.append(draw(torch.tensor([6, 5, 7, 9, 1, 9]), (4, 2)))  # the same ids in another order
    assert all((whole != other).all() for other in others)


def test_lines_hold_the_same_choices_and_no_empty_token():
    chosen = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]]).bool()
    weights = torch.arange(15.0).view(3, 5).requires_grad_()
    experts_TK, weights_TK = choices_of(chosen, weights)
    assert experts_TK.tolist() == [[0, 1, 2, 3, 4], [-1] * 5, [1, 4, -1, -1, -1]]
    tokens, experts, values = split_rows(experts_TK, weights_TK, 2)
    assert tokens.tolist() == [0, 0, 0, 2]
    assert experts.tolist() == [[0, 1], [2, 3], [4, -1], [1, 4]]
    values.sum().backward()
    assert torch.equal(weights.grad, chosen.float())


def test_a_layer_computes_lines_as_it_computes_choices():
    layer = moeyard.MoELayer(16, 8, 5, router=moeyard.TopK(k=3), backend="reference").double()
    x = torch.randn(7, 16, dtype=torch.float64)
    plain, routing = layer(x)
    layer.gate.k = 2  # as if the router's tokens had visited more experts than its k
    lines = layer._run_lines(x, routing, layer.path, None)
    torch.testing.assert_close(lines, plain)


def test_shares_of_a_loss_that_is_not_linear_add_up_in_value_and_gradient():
    def variation(sums):
        return sums.var() / sums.mean() ** 2

    rows = torch.rand(10, 4, dtype=torch.float64, requires_grad=True)
    expected = variation(rows.sum(0))
    (gradient,) = torch.autograd.grad(expected, rows)
    parts = [rows[:3].sum(0), rows[3:].sum(0)]
    whole = from_fixed_point(sum(to_fixed_point(part) for part in parts), torch.float64)
    shares = [share_of(variation, parts[0], whole, 0.3), share_of(variation, parts[1], whole, 0.7)]
    torch.testing.assert_close(sum(shares), expected)
    (found,) = torch.autograd.grad(sum(shares), rows)
    torch.testing.assert_close(found, gradient)


def test_the_list_names_every_router_and_shows_the_options_of_one(capsys):
    assert main(["routers"]) == 0
    listed = capsys.readouterr().out
    kinds = [config.model_fields["kind"].default for config in ROUTERS]
    assert [line.split()[0] for line in listed.splitlines()[1 : 1 + len(kinds)]] == kinds
    (line,) = [line for line in listed.splitlines() if line.startswith("local_search ")]
    assert line.removeprefix("local_search").strip().startswith("as the inner router  ")
    page = (Path(__file__).parent.parent.parent / "docs" / "routers.md").read_text()
    assert [kind for kind in kinds if f"\n| `{kind}` |" not in page] == []
    assert main(["routers", "hash"]) == 0
    assert "table: random: experts drawn per token id" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["task", "timestep"])
def test_routers_that_read_what_a_text_does_not_have_cannot_continue_one(kind):
    for config in (moeyard.router(kind), moeyard.router("local_search", router={"kind": kind})):
        with pytest.raises(ConfigError, match=f"cannot continue a text: .*kind is {kind}, which"):
            check_causal(config)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        ("hush", {}, "router.kind is 'hush'; did you mean 'hash'?"),
        ("hash", {"z_loss": 1}, "router.z_loss is not a known key"),
        ("soft_moe", {}, "router: kind is 'soft_moe', but Soft MoE is a layer for encoders, whose"),
        ("topk", {"k": 0}, "router.k: it is 0, but should be greater than or equal to 1."),
    ],
)
def test_wrong_routers_get_one_sentence(kind, fields, sentence):
    with pytest.raises(ConfigError) as caught:
        moeyard.router(kind, **fields)
    assert str(caught.value).startswith(sentence)
