"""Which model a route file belongs to."""

import hashlib
import json
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ..config.model import LayersConfig
from ..models.model import Model

SAMPLES = 4096
"""Values of each tensor in a fingerprint of weights."""


class ModelIdentity(BaseModel):
    """The hashes of a model: equal for a run, its export and a converted copy of that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    """Of everything that the meaning of weights depends on. Routes belong to an architecture."""
    weights: str | None = None
    """Of samples of the tensors outside the experts, as they are in memory; None in training, where
    they change with every step."""


def identity_of(config: LayersConfig, decoder: Model | None = None) -> ModelIdentity:
    """Return the identity of a model; with ``decoder`` also that of its weights."""
    text = json.dumps(config.architecture(), sort_keys=True)
    weights = None if decoder is None else _fingerprint(decoder)
    return ModelIdentity(architecture=_short(hashlib.sha256(text.encode())), weights=weights)


@torch.no_grad()
def _fingerprint(decoder: Model) -> str:
    """Hash evenly spaced values of each tensor outside the experts, which may not be in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        if ".experts." in name:
            continue
        flat = tensor.reshape(-1)
        stride = max(1, flat.numel() // SAMPLES)
        sample = flat[::stride][:SAMPLES].cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return _short(digest)


def _short(digest: Any) -> str:
    text: str = digest.hexdigest()
    return text[:16]
