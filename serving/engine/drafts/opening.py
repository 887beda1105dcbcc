"""Open the speculation of an engine, which shows what came of it."""

from functools import partial

from ....moe.drafts.speculation import Speculation
from ....moe.models.draft_rows import open_speculation
from ....moe.models.language_model import LanguageModel
from ..metrics import EngineMetrics
from .metrics import DraftMetrics


def open_counted(
    name: str, num_rows: int, model: LanguageModel, metrics: EngineMetrics
) -> Speculation | None:
    """Return what :func:`.open_speculation` does, with counters among an engine's metrics.

    Raises what that does.
    """
    return open_speculation(name, num_rows, model.decoder, partial(DraftMetrics, metrics.registry))
