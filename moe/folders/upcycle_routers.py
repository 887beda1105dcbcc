"""The routers that an upcycled model may begin with, and how the dense MLP is cut for each."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from ...errors import ConfigError
from ..routers.router import RouterConfig
from ..routers.stochastic import Stochastic
from ..routers.topk import TopK

UpcycleRouter = Literal["topk", "routed_ffn", "stochastic"]


class Beginning(ABC):
    """One router to begin with."""

    shares_rows: ClassVar[bool]
    """Whether the slices of a copy have one router row."""

    @abstractmethod
    def check(self, num_experts: int, k: int, split: int) -> None:
        """Raise :class:`ConfigError` for sizes that do not fit this router."""

    @abstractmethod
    def config(self, k: int) -> RouterConfig:
        """Return the router's configuration."""

    @abstractmethod
    def down_factor(self, split: int) -> int:
        """Return what down projections are multiplied by, to undo the router's weights."""


class Copies(Beginning):
    """Top-k over copies of the MLP, whole or in slices (Komatsuzaki et al. 2023)."""

    shares_rows = True

    def check(self, num_experts: int, k: int, split: int) -> None:
        """Tokens must choose whole copies."""
        if not split <= k <= num_experts or k % split:
            raise ConfigError(
                f"k is {k}, but tokens must choose whole copies of split = {split} experts to "
                f"begin as the dense model; use a multiple of {split} from {split} to "
                f"{num_experts}."
            )

    def config(self, k: int) -> RouterConfig:
        """Weights are a softmax over the choices."""
        return TopK(k=k)

    def down_factor(self, split: int) -> int:
        """The weights of a copy's slices sum to the weight of the copy."""
        return split


class Slices(Beginning):
    """One copy of the MLP, cut into as many slices as there are experts."""

    shares_rows = False

    def check(self, num_experts: int, k: int, split: int) -> None:
        """There is one copy."""
        if split != num_experts:
            raise ConfigError(
                f"split is {split}, but this router cuts one MLP into num_experts = {num_experts} "
                f"slices; use split = {num_experts}, or router topk."
            )
        if not 1 <= k <= num_experts:
            raise ConfigError(
                f"k is {k}, but there are {num_experts} slices; use 1 to {num_experts}."
            )


class RoutedFFN(Slices):
    """A token visits the k slices that its router likes best (SPT, Gui et al. 2023).

    A slice's output is multiplied by ``2 sigmoid(logit)``, which is 1 at logit 0. So the model is
    the dense one where k is the number of slices and the router's rows are 0. With a smaller k it
    is not, until training has made up for it. SPT's code also multiplies what goes into the
    activation; here the factor is on the output alone.
    """

    def config(self, k: int) -> RouterConfig:
        """SPT has no balance loss."""
        return TopK(k=k, score="sigmoid", renormalize=False, scale=2.0, balance_loss=0.0)

    def down_factor(self, split: int) -> int:
        """Each weight is about 1."""
        return 1


class RandomSlices(Slices):
    """Training runs slices drawn at random; evaluation runs all of them, as the dense model does.

    That is the sparse training of Split & Merge (MoSA, Zhang et al. 2023). ``moeyard merge`` puts
    the slices together again.
    """

    def config(self, k: int) -> RouterConfig:
        """A draw for each sequence, so that each step trains all slices."""
        return Stochastic(k=k, drawn_per="sequence")

    def down_factor(self, split: int) -> int:
        """Evaluation takes the mean of all slices."""
        return split


UPCYCLE_ROUTERS: dict[UpcycleRouter, Beginning] = {
    "topk": Copies(),
    "routed_ffn": RoutedFFN(),
    "stochastic": RandomSlices(),
}
