"""Messages travel next to the thread that computes, but only where that can save time."""

import threading

import pytest
import torch

from moeyard.moe.routers.routing import Routing
from moeyard.parallel.experts.exchange import Splits
from moeyard.parallel.experts.hop import Level
from moeyard.parallel.experts.pipelined import Degrees, PipelinedPath

T, K, D = 6, 2, 3


class Threads:
    """The exchange of a group of one rank; keeps which threads used it."""

    def __init__(self):
        self.used = set()

    def splits(self, send_CP):
        self.used.add(threading.current_thread())
        return [Splits([counts]) for counts in send_CP]

    def rows(self, columns, splits, order=None):
        self.used.add(threading.current_thread())
        return [[column] for column in columns]


def halves(x_ND, experts_NK, weights_NK, most_choices=None):
    assert most_choices == experts_NK.numel()
    return x_ND * weights_NK.sum(dim=1, keepdim=True)


CASES = {
    "alone": {},
    "chunked": {"degrees": Degrees(2, 1)},
    "beside": {"beside": True},
    "filled": {"fill": True},
}


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_only_what_overlaps_needs_a_lane(case, levels):
    options, fills = CASES[case], []
    exchange = Threads()
    level = Level(exchange, rank=0, size=1, rank_of=torch.zeros_like)
    path = PipelinedPath([level] * levels, options.get("degrees"))
    if "fill" in options:
        path.fill = fills.append
    x_TD = torch.randn(T, D, requires_grad=True)
    weights_TK = torch.full((T, K), 0.25, requires_grad=True)
    none = torch.tensor(0)
    routing = Routing(torch.zeros(T, K, dtype=torch.int32), weights_TK, none, none)
    beside = (lambda: x_TD) if "beside" in options else None
    y_TD = path.run(x_TD, routing, halves, beside)
    y_TD.sum().backward()
    factor = 1.5 if "beside" in options else 0.5
    torch.testing.assert_close(y_TD, factor * x_TD)
    torch.testing.assert_close(x_TD.grad, torch.full((T, D), factor))
    torch.testing.assert_close(weights_TK.grad, x_TD.sum(1, keepdim=True).expand(T, K))
    assert (exchange.used == {threading.current_thread()}) == (case == "alone")
    assert fills == ([path.lanes[0]] * 2 if case == "filled" else [])
