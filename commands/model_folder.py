"""The model that a command opens: a folder, a name of the hub, or a run, exported first."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..moe.models.language_model import LanguageModel


def model_folder(name: str) -> str:
    """Return ``name``, or the export of the run that it names.

    A run's newest checkpoint is exported once, into ``RUN_DIR/exports``.
    """
    run_dir = Path(name)
    if not (run_dir / "config.yaml").is_file() or (run_dir / "config.json").exists():
        return name
    from ..training.checkpoints.export import export_newest

    folder = export_newest(run_dir)
    sys.stderr.write(f"exported run={run_dir} folder={folder}\n")
    return str(folder)


def open_model(arguments: argparse.Namespace) -> "LanguageModel":
    """Open the model of a command that has the options of ``add_loading``."""
    from ..moe.routers.own_code import allow
    from ..serving.loading import load

    allow(arguments.allow_code)
    return load(
        model_folder(arguments.model),
        dtype=arguments.dtype,
        device=arguments.device,
        expert_memory=arguments.expert_memory,
        ignore_unused_weights=arguments.ignore_unused_weights,
    )
