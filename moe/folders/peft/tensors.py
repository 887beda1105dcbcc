"""``adapter_model.safetensors``: the factors A and B of each module."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ....errors import ModelFileError
from ..safetensors_file import SafetensorsFile

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft's two wrappers, in front of each module's name."""
_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


class Factors(NamedTuple):
    """A module's A ``[P, I]`` and B ``[O, P]``, in fp32."""

    a: Tensor
    b: Tensor


def read_factors(folder: Path) -> dict[str, Factors]:
    """Return the factors by the module's name, which ends in ``.base_layer`` for parameters that
    peft wraps inside others.

    Raises :class:`ModelFileError` for other tensors, and for an A without its B.
    """
    if not (folder / FILE).exists():
        raise ModelFileError(
            f"{folder} has no {FILE}; save the adapter with peft's save_pretrained, as safetensors."
        )
    file = SafetensorsFile(folder / FILE)
    try:
        found: dict[str, dict[str, Tensor]] = {}
        for name, entry in file.entries.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise ModelFileError(
                    f"{file.path} has {name[:120]!r}, which is no A or B of a linear layer or of "
                    "experts; leave out embeddings, DoRA and layers trained as a whole."
                )
            if len(entry.shape) != 2 or not entry.dtype.is_floating_point:
                raise ModelFileError(
                    f"{file.path}: {name} is {entry.dtype} of shape {list(entry.shape)}; A and B "
                    "are matrices of floating-point numbers."
                )
            tensor = torch.empty(entry.shape)
            file.read_into(name, tensor)
            found.setdefault(match[1], {})[match[2]] = tensor
    except OSError as error:
        raise ModelFileError(f"{file.path} could not be read ({error}); copy it again.") from None
    finally:
        file.close()
    if not found:
        raise ModelFileError(f"{file.path} has no tensors; save the adapter again.")
    return {name: _pair(file.path, name, parts) for name, parts in found.items()}


def _pair(path: Path, name: str, parts: dict[str, Tensor]) -> Factors:
    for missing in {"A", "B"} - parts.keys():
        raise ModelFileError(
            f"{path} has no {name}.lora_{missing}.weight, but the other factor; copy it again."
        )
    a, b = parts["A"], parts["B"]
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelFileError(f"{path}: {name} holds numbers that are not finite; train it again.")
    return Factors(a, b)
