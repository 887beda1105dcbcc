"""The files of a model folder next to its weights, which folders made from it keep."""

import shutil
from pathlib import Path

from ..items import shape, table
from . import series_scales
from .tokenizer_folder import copy_tokenizer

FILES = (series_scales.FILE, table.FILE, shape.FILE)
"""Scales of series, and items and sizes of sessions, for models that were trained on them."""


def copy_belongings(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer with its chat templates, and what else its model needs."""
    copy_tokenizer(source, target)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
