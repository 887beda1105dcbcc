"""The padded path keeps every choice, and the host learns nothing of the choices.

The numbers of real ranks are in test_paths.py.
"""

import pytest
import torch

from moeyard import TopK, router
from moeyard.errors import ConfigError
from moeyard.moe.experts.base import LayerExperts
from moeyard.moe.routers.routing import Routing
from moeyard.parallel.experts.padded import PaddedPath, Places
from moeyard.parallel.mesh import Mesh
from moeyard.training.read_config import read_run_config

T, K, E, C, D = 7, 2, 4, 5, 3


class Loopback:
    """The exchange of a group of one rank. Counts must not travel."""

    def splits(self, send_CP):
        raise AssertionError("a padded path has nothing to tell")

    def rows(self, columns, splits, order=None):
        assert order is None and all(len(c) == splits.rows_PP[0][0] for c in columns)
        return [[column] for column in columns]


class Scale(LayerExperts):
    """Expert e multiplies by e + 1; its one parameter is its factor."""

    def __init__(self, device):
        super().__init__()
        self.factors = torch.nn.Parameter(torch.arange(1.0, E + 1, device=device).double())

    def forward(self, x_ND, experts_NK, weights_NK, most_choices=None):
        factors_NK = torch.where(experts_NK < 0, 0, self.factors[experts_NK.clamp(min=0)])
        return x_ND * (weights_NK * factors_NK).sum(1, keepdim=True)


def choices(device="cpu"):
    """Return rows, experts and weights; some choices were dropped, and one token has none."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    weights_TK = torch.rand(T, K, generator=generator, dtype=torch.float64)
    experts_TK = torch.tensor([[0, 1], [1, 0], [-1, 3], [3, 1], [-1, -1], [1, -1], [0, 1]]).int()
    found = [part.to(device) for part in (x_TD, weights_TK, experts_TK)]
    return found[0].requires_grad_(), found[1].requires_grad_(), found[2]


def run(device):
    x_TD, weights_TK, experts_TK = choices(device)
    experts = Scale(device)
    none = torch.zeros((), dtype=torch.int64, device=device)
    path = PaddedPath(E, Mesh(), Loopback(), C)
    y_TD = path.run(x_TD, Routing(experts_TK, weights_TK, none, none), experts)
    y_TD.backward(torch.ones_like(y_TD))
    return y_TD, x_TD.grad, weights_TK.grad, experts.factors.grad


def test_all_choices_are_computed_and_all_gradients_come_back():
    x_TD, weights_TK, experts_TK = choices()
    experts = Scale("cpu")
    expected_TD = experts(x_TD, experts_TK, weights_TK)
    expected_TD.backward(torch.ones_like(expected_TD))
    expected = (expected_TD, x_TD.grad, weights_TK.grad, experts.factors.grad)
    for found, wanted in zip(run("cpu"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_no_size_and_no_branch_depends_on_a_choice():
    """Tensors of the meta device have no values. Code that asks for one gets an error."""
    shapes = [tuple(part.shape) for part in run("meta")]
    assert shapes == [(T, D), (T, D), (T, K), (E,)]


def test_places_are_in_the_order_of_tokens_and_the_rest_is_empty():
    places = Places.of(choices()[2], E, C)
    none = T * K
    assert places.choice_M.view(E, C).tolist() == [
        [0, 3, 12, none, none],
        [1, 2, 7, 10, 13],
        [none] * 5,
        [5, 6, none, none, none],
    ]


def test_a_rank_without_rows_sends_empty_places():
    places = Places.of(torch.empty(0, K, dtype=torch.int32), E, C)
    assert places.spread(torch.empty(0, D)).equal(torch.zeros(E * C, D))
    assert places.fold(torch.ones(E * C, D)).shape == (0, D)


def test_more_rows_than_the_router_promised_are_refused():
    with pytest.raises(ConfigError, match="more than 4 rows of a rank"):
        Places.of(choices()[2], E, 4)


def test_evaluation_drops_nothing_and_so_takes_the_plain_path():
    class Counting(Loopback):
        def splits(self, send_CP):
            raise NotImplementedError("counts travel")

    x_TD, weights_TK, experts_TK = choices()
    path = PaddedPath(E, Mesh(), Counting(), C)
    none = torch.zeros((), dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="counts travel"):
        path.run(x_TD, Routing(experts_TK, weights_TK, none, none), Scale("cpu").eval())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TopK(k=2), None),
        (TopK(k=2, capacity={"factor": 1.5}), 24),
        (TopK(k=2, capacity={"factor": 9}), 32),
        (TopK(k=2, capacity={"factor": 0.7, "rounding": "up", "multiple_of": 4}), 12),
        (router("noisy", k=1, capacity={"factor": 1.0, "at_least": 9}), 9),
        (router("expert_choice", k=2), 16),
        (router("expert_choice", k=2, choice="mutual"), None),
        (router("base"), 8),
        (router("hash"), None),
    ],
)
def test_routers_say_how_many_rows_an_expert_takes_of_32_tokens(config, expected):
    assert config.most_rows(32, E) == expected


CAPACITY = "model.moe.router={kind: topk, capacity: {factor: 1}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "the topk router does not limit the rows of an expert; give"),
        ([CAPACITY, "train.packing=documents"], "documents or chats of any length"),
        ([CAPACITY, "parallel.chunks=2"], r"chunks is 2, but parallel.path is padded"),
        ([CAPACITY, "parallel.copies={}"], "copies is .*but parallel.path is padded"),
        ([CAPACITY, "parallel.ep=1"], "path is padded, but parallel.ep is 1"),
    ],
)
def test_a_run_without_a_bound_is_refused(config_file, overrides, message):
    options = ["parallel.path=padded", "parallel.ep=2", *overrides]
    with pytest.raises(ConfigError, match=message):
        read_run_config(config_file, options)
