"""What must be equal on leader and owner, so that lines have the same bits everywhere."""

import hashlib
import json
from typing import NamedTuple, Self

import torch

from ...dtypes import short_name
from ...errors import ConfigError
from ...kernels.trust import cpp
from ...moe.folders.folder import ModelFolder
from ...moe.routes.identity import identity_of

WORDS = {
    "architecture": "another model",
    "weights": "other files of the model",
    "dtype": "another dtype",
    "kernels": "other kernels",
}
"""What differs, in words."""


class Facts(NamedTuple):
    """Of one process."""

    architecture: str
    weights: str
    """Hash of the names and sizes of the folder's weights, and of its hashes of experts."""
    dtype: str
    kernels: str
    """Instruction set of the C++ kernels, or torch and why."""
    pid: int
    num_slots: int

    @classmethod
    def of(cls, files: ModelFolder, dtype: torch.dtype, pid: int, num_slots: int) -> Self:
        """Return the facts of this process about an open folder."""
        library = cpp()
        kernels = library.state if library.functions is not None else f"torch {torch.__version__}"
        architecture = identity_of(files.config).architecture
        return cls(architecture, _weights(files), short_name(dtype), kernels, pid, num_slots)

    def to_json(self) -> bytes:
        """Return the facts as JSON."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Return the facts of :meth:`to_json`."""
        return cls(**json.loads(data))

    def check_same(self, other: "Facts", index: int) -> None:
        """Raise :class:`ConfigError` if owner ``index`` would compute other bits than this one."""
        for name, words in WORDS.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ConfigError(
                    f"owner {index} of the experts has {words} ({theirs}) than the leader "
                    f"({mine}); use the same folder, program and kind of processor everywhere."
                )


def _weights(files: ModelFolder) -> str:
    digest = hashlib.sha256()
    for path in sorted(files.path.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    hashes = files.path / "expert_hashes.json"
    if hashes.is_file():
        digest.update(hashes.read_bytes())
    return digest.hexdigest()[:16]
