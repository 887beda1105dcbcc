"""The objectives by the ``data.format`` that they train on."""

from typing import Any

from .chat import ChatObjective
from .classify import ClassifyObjective
from .next_token import NextTokenObjective
from .objective import Objective
from .preference import PreferenceObjective

OBJECTIVES: dict[str, type[Objective[Any]]] = {
    "text": NextTokenObjective,
    "chat": ChatObjective,
    "classify": ClassifyObjective,
    "preference": PreferenceObjective,
}
