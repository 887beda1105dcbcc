"""Small folders whose experts differ in width."""

from pathlib import Path

from moeyard.moe.folders.convert import convert
from moeyard.moe.routers.topk import TopK

from small_model import CONFIG, with_router, write_random_model

KEYS = [(layer, expert) for layer in (0, 2) for expert in range(6)]
BITS_OF = {(layer, expert): 4 if (layer + expert) % 3 else 8 for layer, expert in KEYS}
"""4 experts of 8 bits and 8 of 4, both widths in each layer."""


def wide_config(router: TopK | None = None):
    """Return the small configuration with widths that groups divide."""
    config = CONFIG if router is None else with_router(router)
    moe = config.moe.model_copy(update={"d_expert": 64})
    return config.model_copy(update={"d_model": 64, "moe": moe})


def write_mixed_model(folder: Path, router: TopK | None = None) -> Path:
    """Write a plain model to ``folder / "plain"`` and a mixed one, which is returned."""
    write_random_model(folder / "plain", wide_config(router))
    convert(folder / "plain", folder / "mixed", bits_of=BITS_OF)
    return folder / "mixed"
