"""The model that a command opens: a folder, a name of the hub, or a run, exported first."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..moe.models.language_model import LanguageModel
    from ..serving.experts.options import StoreOptions
    from ..serving.experts.store import ExpertStore


def model_folder(name: str) -> str:
    """Return ``name``, or the export of the run that it names.

    A run's newest checkpoint is exported once, into ``RUN_DIR/exports``.
    """
    run_dir = Path(name)
    if not (run_dir / "config.yaml").is_file() or (run_dir / "config.json").exists():
        return name
    from ..training.checkpoints.export import export_newest

    folder = export_newest(run_dir)
    sys.stderr.write(f"opened run={run_dir} export={folder}\n")
    return str(folder)


def trained_length(name: str) -> int | None:
    """Return the tokens of a sequence in the training of the run ``name``; None for a model."""
    config = Path(name) / "config.yaml"
    if not config.is_file():
        return None
    import yaml

    length: int = yaml.safe_load(config.read_text())["train"]["sequence_length"]
    return length


def open_model(arguments: argparse.Namespace) -> "LanguageModel":
    """Open the model of a command that has the options of ``add_loading``."""
    from ..moe.routers.own_code import allow

    allow(arguments.allow_code)
    model, _ = open_with(arguments, model_folder(arguments.model), store_options(arguments))
    return model


def open_kind_of(arguments: argparse.Namespace, *kinds: str) -> Any:
    """Open a model of one of ``kinds`` for a command that has the options of ``add_loading``."""
    from ..moe.routers.own_code import allow
    from ..serving.loading import open_kind

    allow(arguments.allow_code)
    model, _ = open_kind(
        model_folder(arguments.model),
        kinds,
        dtype=arguments.dtype,
        device=arguments.device,
        expert_memory=arguments.expert_memory,
        ignore_unused_weights=arguments.ignore_unused_weights,
        options=store_options(arguments),
    )
    return model


def store_options(arguments: argparse.Namespace) -> "StoreOptions":
    """Return how experts are kept and read, of ``add_loading`` and perhaps ``add_correction``."""
    from ..serving.experts.options import StoreOptions

    log, fallback = arguments.expert_log, arguments.expert_fallback
    return StoreOptions(
        policy=arguments.expert_policy,
        predictor=arguments.expert_predictor,
        reader=arguments.expert_reader,
        log=None if log is None else Path(log),
        sparsity=arguments.expert_sparsity,
        fallback=None if fallback is None else Path(fallback),
        fallback_above=arguments.expert_fallback_above,
        correction=getattr(arguments, "expert_correction", None),
        correction_threshold=getattr(arguments, "expert_correction_threshold", None),
    )


def open_with(
    arguments: argparse.Namespace, name: str, options: "StoreOptions"
) -> "tuple[LanguageModel, ExpertStore | None]":
    """Open a model with a command's other options, and its store."""
    from ..serving import loading
    from ..serving.planning.start import show_start
    from ..settled import settle

    show_start()
    opened = loading.open_model(
        name,
        dtype=arguments.dtype,
        device=arguments.device,
        expert_memory=arguments.expert_memory,
        ignore_unused_weights=arguments.ignore_unused_weights,
        options=options,
    )
    settle()
    return opened
