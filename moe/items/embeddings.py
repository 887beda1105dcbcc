"""Embeddings of items from a file.

N items, D width.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import DataError
from ..arrays import ArrayFile


class Embeddings(NamedTuple):
    """Items by name, with what each looks, sounds or reads like."""

    names: tuple[str, ...]
    x_ND: Tensor
    """fp32."""


def read_embeddings(path: Path) -> Embeddings:
    """Read ``ids`` and ``embeddings`` of an ``.npz`` or ``.safetensors`` file.

    Ids are texts or whole numbers. In safetensors, which have no texts, they may also be a JSON
    list under ``ids`` in the metadata. Raises :class:`DataError` for what cannot be used.
    """
    read = {".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix.lower())
    if read is None or not path.is_file():
        raise DataError(f"EMBEDDINGS is {str(path)!r}; give a .npz or .safetensors file.")
    ids, values = read(path)
    if not isinstance(ids, list) or not all(type(one) in (str, int) for one in ids):
        raise DataError(f"{path} has ids that are not texts or whole numbers; correct them.")
    x_ND = torch.as_tensor(values)
    if x_ND.ndim != 2 or len(x_ND) != len(ids) or not x_ND.is_floating_point():
        raise DataError(
            f"{path} has {len(ids)} ids and embeddings of shape {tuple(x_ND.shape)} and type "
            f"{str(x_ND.dtype).removeprefix('torch.')}; give a row of floating-point numbers for "
            "each id."
        )
    names = tuple(str(one) for one in ids)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has the item {twice!r} twice; keep one of them.")
    bad_N = ~x_ND.isfinite().all(dim=1)
    if bad_N.any():
        raise DataError(
            f"{path} has an embedding of {names[int(bad_N.long().argmax())]!r} that is not finite; "
            "correct it or take the item out."
        )
    return Embeddings(names, x_ND.float())


def _read_npz(path: Path) -> tuple[Any, Any]:
    file = ArrayFile(path, "EMBEDDINGS")
    missing = next((name for name in ("ids", "embeddings") if name not in file.shapes), None)
    if missing is not None:
        raise _unreadable(path, f"no array {missing!r}")
    return file.read("ids").tolist(), file.read("embeddings")


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    try:
        with safe_open(path, "pt") as file:
            ids = (file.metadata() or {}).get("ids")
            found = file.get_tensor("ids").tolist() if ids is None else json.loads(ids)
            return found, file.get_tensor("embeddings")
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, str(error).strip("'\"").split("\n")[0]) from None


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} has no ids and embeddings ({reason}); give arrays under these two names."
    )
