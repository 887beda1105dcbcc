"""Let an opened model speculate: its answers then come by several tokens a step."""

from pathlib import Path

from ..moe.drafts.tally import DraftCounts
from ..moe.models.draft_rows import open_speculation
from ..moe.models.language_model import LanguageModel
from .engine.drafts.checks import check_speculative


def speculate(
    model: LanguageModel,
    name: str,
    num_rows: int,
    fallback: str | Path | None = None,
    record_routes: Path | None = None,
) -> DraftCounts:
    """Have ``model`` check guesses of the drafter ``name``, at most ``num_rows`` in one step.

    Returns what will count them. ``fallback`` and ``record_routes`` are the folder of copies of
    experts and the file of routes, if there are any. Raises :class:`ConfigError` for unknown names
    and for what does not go together.
    """
    routes = None if record_routes is None else str(record_routes)
    check_speculative(name, routes, None if fallback is None else Path(fallback))
    counts = DraftCounts()
    model.speculation = open_speculation(name, num_rows, model.decoder, lambda: counts)
    return counts
