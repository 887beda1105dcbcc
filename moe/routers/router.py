"""What every router is."""

from torch import Tensor, nn

from .config import Hash, TopK
from .routing import Lookahead, RouterInput, Routing


class Router(nn.Module):
    """Base of routers. ``route`` is called where ``lookahead`` says, by training and serving.

    A router belongs to the layer whose experts it selects, wherever it reads.
    """

    lookahead: Lookahead
    config: TopK | Hash

    def __init__(self, k: int, num_experts: int) -> None:
        super().__init__()
        self.k = k
        self.num_experts = num_experts

    def route(self, router_input: RouterInput) -> Routing:
        """Choose experts for every row."""
        raise NotImplementedError

    def update_bias(self, counts_E: Tensor) -> None:
        """Answer to the load of a finished step, ``[E]`` rows of the global batch.

        Only routers with a balancing bias do; it is called once per step on every rank.
        """
