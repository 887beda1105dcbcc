"""Run some experts of a layer on rows, as they come into memory. N rows, K choices."""

from contextlib import closing

from torch import Tensor

from ...kernels.waves import Waves
from ...moe.routers.routing import count_choices
from ..experts.store import ExpertStore


def run_experts(
    store: ExpertStore, layer: int, num_experts: int, waves: Waves, experts_NK: Tensor
) -> None:
    """Run all experts in ``experts_NK`` that are not -1 on ``waves``.

    Raises :class:`ExpertReadError` without its rows.
    """
    counts = count_choices(experts_NK, num_experts).tolist()
    rows_of = {expert: rows for expert, rows in enumerate(counts) if rows}
    left = set(rows_of)
    with closing(store.stream(layer, rows_of)) as stream:
        for ready, experts in stream:
            waves.add(experts, only=ready)
            left -= set(ready)
    assert not left, f"experts {left} of layer {layer} have rows and never came"


def read_first(store: ExpertStore, experts_of: dict[int, list[int]]) -> None:
    """Read experts before the first request comes."""
    for layer, experts in experts_of.items():
        with closing(store.stream(layer, dict.fromkeys(experts, 1))) as stream:
            for _ in stream:
                pass
