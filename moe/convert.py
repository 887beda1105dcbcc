"""From one model folder to another: other types, quantized experts, files made whole again."""

import shutil
from pathlib import Path
from typing import Literal

import torch

from .families.table import FAMILIES
from .generation_config import FILE as GENERATION_FILE
from .hf_config import to_hf
from .model_folder import ModelFolder
from .model_writer import write_model_folder
from .router_config import TopK
from .write_weights import FolderWeights, plan_weights

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


def convert(source: Path, target: Path, dtype: Dtype | None = None) -> str:
    """Write the model of folder ``source`` to ``target`` and return its ``model_type`` there.

    ``dtype`` is the type of the weights; None keeps it. Tokenizer, chat template and generation
    config come along. One tensor, or one expert, is in memory at a time.
    """
    folder = ModelFolder(source)
    try:
        folder.check()
        chosen = stored_dtype(folder) if dtype is None else DTYPES[dtype]
        values = to_hf(folder.config, str(chosen).removeprefix("torch."), source=folder.values)
        family = FAMILIES[values["model_type"]]
        weights = FolderWeights(folder, chosen)
        plans = plan_weights(folder.config, family, weights, chosen, router_dtype(folder, chosen))
        generation = folder.read_optional(GENERATION_FILE)
        write_model_folder(
            target, values, plans, lambda unfinished: copy_tokenizer(source, unfinished), generation
        )
    finally:
        folder.close()
    return family.model_type


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer, with its chat template."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def stored_dtype(folder: ModelFolder) -> torch.dtype:
    """Return the type of a folder's floating weights: its embeddings'."""
    return folder.entry("embed_tokens.weight").dtype


def router_dtype(folder: ModelFolder, chosen: torch.dtype) -> torch.dtype:
    """Return the type to write routers in: theirs if it is wider, for it decides who is chosen."""
    for layer in folder.config.moe_layers:
        name = f"layers.{layer}.mlp.gate.weight"
        if isinstance(folder.config.router(layer), TopK):
            return torch.promote_types(folder.entry(name).dtype, chosen)
    return chosen
