"""The ways of a layer's rows that are worth trying: paths, and chunks for links and experts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...moe.experts.base import LayerExperts
from ..experts.open_path import PathKind
from ..experts.pipelined import PipelinedPath
from ..mesh import Mesh
from ..planning.cost_model import CostModel
from ..planning.pipeline import DEGREES, Degrees, ranked_degrees
from .layer import LayerShape, even_work_of, measure_layer

NEAR = 1.5
"""What is expected to take longer than this times the best is not tried."""
MOST = 6
"""Of those that should be fastest; the plain way may be one of them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A path with its chunks."""

    kind: PathKind
    path: PipelinedPath
    degrees: Degrees
    model: CostModel
    """Of the path, as measured."""


def find_candidates(
    paths: Mapping[PathKind, PipelinedPath],
    shape: LayerShape,
    experts: LayerExperts,
    mesh: Mesh,
    device: torch.device,
    beside_s: float = 0.0,
) -> list[Candidate]:
    """Measure every path; return the plain way, the first path without chunks, and the best others.

    Every rank must call it and gets the same ones, those expected to be fastest first. Tokens are
    expected to choose their experts evenly. ``beside_s`` are the seconds of a shared expert.
    """
    found: list[Candidate] = []
    for kind, path in paths.items():
        levels = path.levels
        model = measure_layer(shape, levels, experts, mesh, device)
        work = even_work_of(shape, levels, mesh, beside_s)
        degrees = [degree for degree in DEGREES if degree <= max(1, shape.tokens)]
        found += [Candidate(kind, path, d, model) for d in ranked_degrees(model, work, degrees)]
    first = next(iter(paths))
    found.sort(key=lambda c: c.degrees.seconds)
    near = [c for c in found if c.degrees.seconds <= NEAR * found[0].degrees.seconds][:MOST]
    plain = next(c for c in found if c.kind == first and c.degrees.is_whole)
    return [plain, *(candidate for candidate in near if candidate is not plain)]
