"""Copies of the embedding: a head that the configuration ties to it, or another stack's."""

import torch

from ...errors import ModelFileError
from .tensor_files import TensorFiles

HEAD = "lm_head.weight"


def check_tied_head(files: TensorFiles, embedding: str) -> None:
    """Raise :class:`ModelFileError` if the head is another matrix than ``embedding``."""
    if not _is_copy(files, HEAD, embedding):
        raise ModelFileError(
            f"config.json has tie_word_embeddings = true, but {HEAD} differs from "
            f"{embedding}; set it to false."
        )


def check_copy(files: TensorFiles, name: str, embedding: str) -> None:
    """Raise :class:`ModelFileError` if a matrix that models read as ``embedding`` is another."""
    if not _is_copy(files, name, embedding):
        raise ModelFileError(
            f"{name} differs from {embedding}, but models of this family have one embedding; copy "
            "the folder again."
        )


def _is_copy(files: TensorFiles, name: str, embedding: str) -> bool:
    """Compare a few rows: a folder may hold one matrix under both names."""
    shape = files.entry(embedding).shape
    files.check_shape(name, shape)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        rows = torch.empty(2, *shape[1:])
        for one, out in zip((embedding, name), rows, strict=True):
            files.read_part(one, row, out)
        if not torch.equal(*rows):
            return False
    return True
