"""Run lm-eval's tasks on a model of this process (EleutherAI's lm-evaluation-harness)."""

import importlib.util
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...moe.models.language_model import LanguageModel


def check_lm_eval() -> None:
    """Raise :class:`ConfigError` if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval, which is not installed; pip install lm-eval.")


def run_tasks(
    model: LanguageModel, tasks: list[str], limit: int | None, include_path: Path | None
) -> dict[str, float]:
    """Return the metrics of ``tasks`` as ``TASK/METRIC``; ``limit`` bounds the examples of each.

    ``include_path`` is a folder with tasks in lm-eval's YAML form. Raises :class:`ConfigError` for
    tasks that lm-eval does not know, and for models whose answers use core channels.
    """
    if model.decoder.core is not None:
        raise ConfigError(
            "--tasks score texts in one piece, but with expert-sparsity coreinfer only answers "
            "leave channels out; measure with moeyard price --text."
        )
    import lm_eval
    from lm_eval.tasks import TaskManager

    from .lm_eval_model import LmEvalModel

    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks has {unknown[0]!r}, which lm-eval does not know; correct it.")
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=LmEvalModel(model), tasks=tasks, limit=limit, task_manager=manager
    )
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    }
