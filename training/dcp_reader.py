"""Read torch.distributed.checkpoint folders without running what a pickle says.

DCP keeps its metadata as a pickle. Only the plain classes such metadata consists of are
resolved here; anything else is refused before it is called.
"""

import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ..errors import CheckpointError

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            value = getattr(torch, name, None)
            if name == "Size" or isinstance(value, torch.dtype):
                return value
        elif module.startswith("pathlib") and name.endswith("Path"):
            return pathlib.PurePosixPath
        elif name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"checkpoint metadata names {module}.{name}, which no checkpoint of ours does; "
            "do not use this folder."
        )


class SafeFileSystemReader(FileSystemReader):
    """A :class:`FileSystemReader` whose metadata cannot call anything."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None
        """Read once: DCP asks again in every load, and a large model has 100,000 entries."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata, allowing only DCP's own classes."""
        if self._metadata is None:
            with (pathlib.Path(self.path) / ".metadata").open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        metadata = self._metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
