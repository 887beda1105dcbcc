"""The leader's view of all owners: whom to ask, and what is told to all."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..experts.forwards import Forward
from .facts import Facts
from .hiring import Hiring
from .link import OwnerLink
from .owner_metrics import OwnerMetrics
from .ownership import Ownership
from .question import Question
from .rebalance import Rebalancer

LEADER = 0


class Team:
    """The owners of a model's experts. Owner 0 is the leader, and the others have a link."""

    def __init__(
        self, ownership: Ownership, hiring: Hiring, secret: bytes, rebalancer: Rebalancer
    ) -> None:
        self.ownership = ownership
        self.metrics = OwnerMetrics(ownership.num_owners)
        self._hiring, self._rebalancer = hiring, rebalancer
        self._links = [
            OwnerLink(index, hiring, secret, self.metrics.owners[index])
            for index in range(1, ownership.num_owners)
        ]
        self._count_experts()
        self.metrics.owners[LEADER].up.set(1)

    def open(self, own: Facts) -> None:
        """Connect to all owners, which have been started."""
        for link in self._links:
            link.open(own)

    @property
    def num_slots(self) -> int:
        """Experts that the other owners' memory has room for."""
        return sum(link.facts.num_slots for link in self._links if link.facts is not None)

    def begin(self, forward: Forward) -> None:
        """Tell all owners of a forward; before it, experts may change owners."""
        if self._rebalancer.step(self.ownership):
            self._count_experts()
        for link in self._links:
            link.begin(forward)

    def prefetch(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Let owners read what a layer will need; return the experts of the leader."""
        chosen = np.fromiter(experts, dtype=np.int32)
        owner_n = self.ownership.owner_NK(layer, chosen)
        for link in self._links:
            theirs = chosen[owner_n == link.index].tolist()
            if theirs:
                link.prefetch(layer, theirs)
        own: list[int] = chosen[owner_n == LEADER].tolist()
        return own

    def ask(
        self, layer: int, x_ND: Tensor, experts_NK: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.bool_], list[Question]]:
        """Send rows to the owners of their experts; return which choices are the leader's."""
        owner_NK = self.ownership.owner_NK(layer, experts_NK)
        questions = []
        for link in self._links:
            is_theirs_NK = owner_NK == link.index
            if is_theirs_NK.any():
                questions.append(Question(link, layer, x_ND, experts_NK, is_theirs_NK))
        return owner_NK == LEADER, questions

    def count(
        self, layer: int, experts_NK: npt.NDArray[np.int32], is_own_NK: npt.NDArray[np.bool_]
    ) -> None:
        """Count the rows of a layer, and those of the leader."""
        self._rebalancer.count(layer, experts_NK)
        self.metrics.owners[LEADER].rows.inc(int(np.count_nonzero(is_own_NK)))

    def close(self) -> None:
        """End the connections and the owners."""
        for link in self._links:
            link.close()
        self._hiring.stop()
        self._rebalancer.close()

    def _count_experts(self) -> None:
        owners = range(self.ownership.num_owners)
        self.metrics.set_experts(self.ownership.count(owner) for owner in owners)
