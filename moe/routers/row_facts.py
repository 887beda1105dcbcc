"""What routers may read of rows, and only some data have."""

from collections.abc import Collection
from typing import Literal

RowFact = Literal["token_ids", "tasks", "timesteps"]
"""The argument of an MoE layer's forward."""
_MEANING: dict[RowFact, str] = {
    "token_ids": "the token id",
    "tasks": "the task",
    "timesteps": "the time in a diffusion process",
}


def why_not_among(kind: str, reads: RowFact | None, has: Collection[RowFact]) -> str | None:
    """Return why a model whose rows have ``has`` cannot have a router of ``kind``, or None."""
    if reads is None or reads in has:
        return None
    return (
        f"router.kind is {kind}, which reads {_MEANING[reads]} of each row, and rows of this model "
        f"have none; choose another router, or pass {reads} to an MoELayer in a model of your own."
    )
