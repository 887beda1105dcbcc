"""Small images with targets for three tasks, for tests of vision models."""

from pathlib import Path
from typing import Any

import numpy as np

TASKS: list[dict[str, Any]] = [
    {"name": "side", "kind": "classes"},
    {"name": "parts", "kind": "pixel_classes", "classes": 3},
    {"name": "light", "kind": "pixel_values", "loss_weight": 2},
]
ROUTER: dict[str, Any] = {"kind": "task", "k": 2, "num_tasks": 3}
VIT: dict[str, Any] = {
    "kind": "vit",
    "image_size": [8, 12],
    "patch_size": 4,
    "channels": 1,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
    "tasks": TASKS,
    "moe": {
        "num_experts": 4,
        "d_expert": 12,
        "activation": "gelu",
        "expert_bias": True,
        "router": ROUTER,
    },
}


def arrays(count: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    """Return images of a bright bar on one side, no two alike, and targets.

    Some images lack a target: every fifth the label, every seventh the map of parts.
    """
    random = np.random.default_rng(seed)
    images = random.integers(0, 60, (count, 8, 12)).astype(np.uint8)
    side = np.array(["left", "right"])[random.integers(0, 2, count)]
    parts = np.zeros((count, 8, 12), dtype=np.int64)
    for image, part, name in zip(images, parts, side, strict=True):
        columns = slice(0, 5) if name == "left" else slice(7, 12)
        image[:, columns] += 150
        part[:, columns] = 1 if name == "left" else 2
    side[::5] = ""
    parts[::7] = 255
    parts[:, 0, 0] = -1
    light = (images / 255).astype(np.float32)
    light[:, 7, 11] = np.nan
    return {"images": images, "side": side, "parts": parts, "light": light}


def write_arrays(path: Path, **changes: np.ndarray | None) -> Path:
    """Write the arrays with some of them replaced, or left out where they are None."""
    found = {**arrays(), **changes}
    np.savez(path, **{name: array for name, array in found.items() if array is not None})
    return path
