"""A head that is stored although the configuration ties it to the embedding."""

import torch

from ...errors import ModelFileError
from .tensor_files import TensorFiles

HEAD = "lm_head.weight"


def check_tied_head(files: TensorFiles, embedding: str) -> None:
    """Raise :class:`ModelFileError` if the head is another matrix than ``embedding``.

    Compares a few rows: a folder may hold one matrix under both names.
    """
    shape = files.entry(embedding).shape
    files.check_shape(HEAD, shape)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        rows = torch.empty(2, *shape[1:])
        for name, out in zip((embedding, HEAD), rows, strict=True):
            files.read_part(name, row, out)
        if not torch.equal(*rows):
            raise ModelFileError(
                f"config.json has tie_word_embeddings = true, but {HEAD} differs from "
                f"{embedding}; set it to false."
            )
