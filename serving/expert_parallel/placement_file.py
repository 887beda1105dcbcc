"""Owners from a file: a plan of ``moeyard trace place``, or recorded routes.

N rows, L MoE layers, K choices, E experts.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...moe.config.model import LayersConfig
from ...moe.routes.reader import SUFFIX, route_files
from ...parallel.planning.placement import Placement
from ...parallel.planning.plan_file import read_plan
from .ownership import Ownership, check_owners, contiguous
from .spread import spread

MOST_ROWS = 100_000
"""Rows of routes that are counted: more change little."""


def read_ownership(path: Path | None, config: LayersConfig, num_owners: int) -> Ownership:
    """Return the owners that a file asks for; without one, neighbouring experts share an owner.

    A plan is taken as it is, with its rank r as owner r. From routes, or a folder of them, experts
    that tokens choose together get different owners, and owners equal loads. Raises
    :class:`ConfigError` and :class:`DataError` for a file that does not fit the model or the
    number of owners.
    """
    num_experts = config.moe.num_experts if config.moe is not None else 0
    check_owners(num_owners, num_experts)
    if path is None:
        return contiguous(config.moe_layers, num_experts, num_owners)
    if path.suffix == SUFFIX or path.is_dir():
        return _from_routes(path, config, num_experts, num_owners)
    return Ownership(read_plan(path, config, num_owners).placements(), num_owners)


def _from_routes(path: Path, config: LayersConfig, num_experts: int, num_owners: int) -> Ownership:
    files = route_files([path])
    files[0].check_model(config)
    together_LEE = np.zeros((len(config.moe_layers), num_experts, num_experts))
    num_rows = 0
    for file in files:
        for routes in file.chunks():
            count_together(together_LEE, routes.experts_NLK)
            num_rows += len(routes)
            if num_rows >= MOST_ROWS:
                break
    owners = {
        layer: Placement.owned(num_owners, spread(together_EE, num_rows, num_owners))
        for layer, together_EE in zip(config.moe_layers, together_LEE, strict=True)
    }
    return Ownership(owners, num_owners)


def count_together(
    together_LEE: npt.NDArray[np.float64], experts_NLK: npt.NDArray[np.integer]
) -> None:
    """Add, in place, how many rows chose each pair of experts."""
    num_experts = together_LEE.shape[1]
    for together_EE, experts_NK in zip(together_LEE, experts_NLK.swapaxes(0, 1), strict=True):
        chosen_NE = np.zeros((len(experts_NK), num_experts + 1))
        np.put_along_axis(chosen_NE, experts_NK.astype(np.int64), 1.0, axis=1)  # -1 = the last
        chosen_NE = chosen_NE[:, :num_experts]
        together_EE += chosen_NE.T @ chosen_NE
