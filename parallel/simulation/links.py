"""Seconds of collectives, as lines in the bytes: ``latency + seconds for each byte``.

P ranks of a group, N nodes they are on, g = P / N of them on each node, W bytes of the buffer.
"""

import math
from dataclasses import dataclass

from ..planning.cost_model import FREE, Linear
from .cluster import Cluster, Link
from .workload import Group


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a rank while all ranks of its node send as much."""

    inside_s: float
    """Seconds for a byte that a GPU sends to another one of its node."""
    between_s: float
    """Seconds for a byte that a GPU sends to another node, with its share of a network card."""
    inside_all_to_all_s: float
    """The same in an all-to-all."""
    between_all_to_all_s: float
    inside_latency_s: float
    between_latency_s: float
    ranks_per_card: int
    inside_message_s: float
    between_message_s: float
    leaf_nodes: int | None
    oversubscription: float
    is_gloo: bool

    @classmethod
    def of(cls, cluster: Cluster, per_node: int) -> "Links":
        """Return the links of a cluster with ``per_node`` GPUs in use on each node."""
        inside, between = cluster.inside_node, cluster.between_nodes
        inside_s, inside_all_to_all_s = _byte_s(inside, 1)
        sharing = 1 if between is None else min(between.gpus_per_nic, per_node)
        between_s, between_all_to_all_s = _byte_s(between, sharing)
        return cls(
            inside_s=inside_s,
            between_s=between_s,
            inside_all_to_all_s=inside_all_to_all_s,
            between_all_to_all_s=between_all_to_all_s,
            inside_latency_s=inside.latency if inside else 0.0,
            between_latency_s=between.latency if between else 0.0,
            ranks_per_card=sharing,
            inside_message_s=inside.message if inside else 0.0,
            between_message_s=between.message if between else 0.0,
            leaf_nodes=between.leaf_nodes if between else None,
            oversubscription=between.oversubscription if between else 1.0,
            is_gloo=cluster.collectives == "gloo",
        )

    def latency(self, group: Group) -> float:
        """Return one way through the group: the slowest link that it has."""
        if group.size == 1:
            return 0.0
        return self.between_latency_s if group.nodes > 1 else self.inside_latency_s

    def far_s(self, group: Group) -> float:
        """Return the seconds of a byte that one rank sends evenly to all others of other nodes.

        Bytes that leave a leaf share its links upwards.
        """
        nodes, leaf = group.nodes, self.leaf_nodes
        byte_s = self.between_all_to_all_s
        if leaf is None or nodes <= leaf:
            return byte_s
        leaving = (nodes - leaf) / (nodes - 1)
        return byte_s * max(1.0, leaving * self.oversubscription)

    def all_to_all(self, group: Group, on_cards: float = 1.0) -> Linear:
        """Return the line of an all-to-all, by the bytes that the busiest rank sends, to itself
        included. Ranks that share the busiest card send ``on_cards`` times as much on average.

        The links inside a node and between nodes work at the same time, with gloo in turns.
        Messages are issued one after the other.
        """
        size, near = group.size, group.per_node
        if size == 1:
            return FREE
        inside = (near - 1) / size * self.inside_all_to_all_s
        between = (size - near) / size * self.far_s(group) * on_cards
        messages = (near - 1) * self.inside_message_s + (size - near) * self.between_message_s
        byte_s = inside + between if self.is_gloo else max(inside, between)
        return Linear(self.latency(group) + messages, byte_s)

    def all_reduce(self, group: Group) -> Linear:
        """Return the line of a sum, by the bytes of the buffer: a ring sends 2 (P-1)/P of them.

        A ring goes from node to node over the cards of all ranks of the group on a node. The
        latency is that of a tree over nodes and one inside them, up and down.
        """
        return self._ring(group, 2.0)

    def all_gather(self, group: Group) -> Linear:
        """Return the line of a gather, by the bytes of the whole: (P-1)/P of them arrive."""
        return self._ring(group, 1.0)

    def reduce_scatter(self, group: Group) -> Linear:
        """Return the line of a sum whose parts stay on their ranks, by the bytes of the whole."""
        return self._ring(group, 2.0 if self.is_gloo else 1.0)

    def _ring(self, group: Group, rounds: float) -> Linear:
        if group.size == 1:
            return FREE
        share = rounds * (group.size - 1) / group.size
        inside = self.inside_s if group.per_node > 1 else 0.0
        between = self.between_s / group.per_node if group.nodes > 1 else 0.0
        steps = math.ceil(math.log2(group.nodes)) * self.between_latency_s
        steps += math.ceil(math.log2(group.per_node)) * self.inside_latency_s
        # The hops of a ring work at the same time, and the slowest one sets the pace.
        return Linear(rounds * steps, share * max(inside, between))


def _byte_s(link: Link | None, sharing: int) -> tuple[float, float]:
    """Return the seconds of a byte over a link that ``sharing`` ranks share, in sums and in
    all-to-alls."""
    if link is None:
        return 0.0, 0.0
    host_s = 0.0 if link.host is None else 1 / link.host
    achieved = link.achieved_all_to_all or link.achieved
    link_s = sharing / link.bandwidth
    return link_s / link.achieved + host_s, link_s / achieved + host_s
