"""The objectives by the ``data.format`` that they train on."""

from .chat import ChatObjective
from .next_token import NextTokenObjective
from .objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "text": NextTokenObjective,
    "chat": ChatObjective,
}
