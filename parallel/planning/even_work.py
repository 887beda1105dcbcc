"""The work of a layer whose tokens choose their experts evenly: what a run starts from."""

from math import comb

from .pipeline import LayerWork


def even_work(
    tokens: int,
    num_experts: int,
    num_choices: int,
    row_bytes: int,
    *,
    ranks: int,
    ranks_per_node: int = 1,
    to_all: bool = False,
    beside_s: float = 0.0,
) -> LayerWork:
    """Return the expected work of a rank with ``tokens``, where any K experts are equally likely.

    A copy of a token goes to every node that has one of its experts, and from there to every rank
    that has one. With ``ranks_per_node`` 1, ranks are the only level. ``to_all`` sends a copy to
    every rank instead. Copies that stay on their rank count as sent. ``beside_s`` are the seconds
    of the shared expert.
    """

    def copies(places: int) -> float:
        """Return how many of ``places`` have one of a token's experts, on average."""
        elsewhere = comb(num_experts - num_experts // places, num_choices)
        return places * (1 - elsewhere / comb(num_experts, num_choices))

    inside = 0.0 if ranks_per_node == 1 else tokens * copies(ranks)
    sent = tokens * (ranks if to_all else copies(ranks // ranks_per_node))
    return LayerWork(sent * row_bytes, tokens * num_choices, inside * row_bytes, beside_s)
