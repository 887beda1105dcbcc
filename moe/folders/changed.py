"""A folder written again as another model: other layers, the same tokenizer and type."""

from pathlib import Path

import torch

from ..config.model import LayersConfig
from .belongings import copy_belongings
from .families.table import FAMILIES
from .folder import ModelFolder
from .generation_config import generation_to_keep
from .hf_config import to_hf
from .write_weights import WeightSource, plan_weights
from .writer import write_model_folder


def write_changed(
    source: Path, folder: ModelFolder, target: Path, config: LayersConfig, weights: WeightSource
) -> str:
    """Write ``weights`` of a model of ``config`` to ``target`` and return its ``model_type``.

    ``folder`` is the open ``source``, whose tokenizer, type and generation settings stay.
    """
    dtype = folder.dtype
    values = to_hf(config, str(dtype).removeprefix("torch."), source=folder.values)
    family = FAMILIES[values["model_type"]]
    write_model_folder(
        target,
        values,
        plan_weights(config, family, weights, dtype, torch.float32),
        lambda unfinished: copy_belongings(source, unfinished),
        generation_to_keep(folder),
    )
    return family.model_type
