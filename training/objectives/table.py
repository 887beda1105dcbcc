"""The objectives by the ``data.format`` that they train on."""

from typing import Any

from .chat import ChatObjective
from .classify import ClassifyObjective
from .denoise import DenoiseObjective
from .forecast import ForecastObjective
from .next_token import NextTokenObjective
from .objective import Objective
from .pairs import PairsObjective
from .preference import PreferenceObjective
from .rank import RankObjective
from .tasks import TasksObjective

OBJECTIVES: dict[str, type[Objective[Any]]] = {
    "text": NextTokenObjective,
    "chat": ChatObjective,
    "classify": ClassifyObjective,
    "series": ForecastObjective,
    "pairs": PairsObjective,
    "sessions": RankObjective,
    "images": TasksObjective,
    "super_resolution": DenoiseObjective,
    "preference": PreferenceObjective,
}
