"""Let an opened model speculate: its answers then come by several tokens a step."""

from pathlib import Path

from ..moe.drafts.table import NONE
from ..moe.drafts.tally import DraftCounts
from ..moe.models.draft_rows import check_rows, open_speculation
from ..moe.models.language_model import LanguageModel
from .engine.drafts.checks import check_speculative
from .load_checks import check_device


def check_speculation(
    name: str,
    num_rows: int,
    device: str = "cpu",
    fallback: str | Path | None = None,
    record_routes: Path | None = None,
) -> None:
    """Raise :class:`ConfigError` for unknown names and for what does not go together.

    It asks for no model, so it comes before one is opened. ``fallback`` and ``record_routes`` are
    the folder of copies of experts and the file of routes, if there are any.
    """
    routes = None if record_routes is None else str(record_routes)
    check_speculative(name, routes, None if fallback is None else Path(fallback))
    if name != NONE:
        check_rows(num_rows, check_device(device, None))


def speculate(model: LanguageModel, name: str, num_rows: int) -> DraftCounts:
    """Have ``model`` check guesses of the drafter ``name``, at most ``num_rows`` in one step.

    Returns what will count them. Raises :class:`ConfigError` for unknown names, and where rows of
    the model depend on each other.
    """
    counts = DraftCounts()
    model.speculation = open_speculation(name, num_rows, model.decoder, lambda: counts)
    return counts
