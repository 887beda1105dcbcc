"""The objectives by name."""

from .next_token import NextTokenObjective
from .objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextTokenObjective,
}
DEFAULT = "next_token"
