"""Read and write torch.distributed.checkpoint folders without running code from a pickle.

DCP keeps its metadata as a pickle. The unpickler here resolves only the plain classes of such
metadata and refuses anything else before it is called. The metadata is checked against the files
before memory is allocated for it. Tensors are read with ``weights_only``.
"""

import math
import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from ...errors import CheckpointError

METADATA = ".metadata"
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
    """A :class:`FileSystemReader` whose metadata cannot call code or claim more than files hold."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        self._folder = path
        self._metadata: Metadata | None = None
        """Cached: DCP reads it in every load, and a large model has 100,000 entries."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata, allowing only DCP's own classes.

        Raises :class:`CheckpointError` if the file is not metadata of our checkpoints.
        """
        if self._metadata is None:
            self._metadata = self._read()
        metadata = self._metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def file_names(self) -> set[str]:
        """Return the names of the files that hold tensors."""
        return {info.relative_path for info in self.read_metadata().storage_data.values()}

    def _read(self) -> Metadata:
        path = self._folder / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            self._check(metadata)
        except CheckpointError:
            raise
        # A tampered pickle can raise any error.
        except Exception as error:
            raise CheckpointError(
                f"{path} is not metadata of a checkpoint ({type(error).__name__}); restore the "
                "checkpoint from a backup."
            ) from None
        assert isinstance(metadata, Metadata)
        return metadata

    def _check(self, metadata: Any) -> None:
        """Raise some error unless the metadata describes tensors that the files can hold."""
        if not isinstance(metadata, Metadata):
            raise TypeError
        room: dict[str, int] = {}
        for index, info in metadata.storage_data.items():
            name = info.relative_path
            if not isinstance(index, MetadataIndex) or pathlib.PurePath(name).name != name:
                raise ValueError
            file = self._folder / name
            size = file.stat().st_size if file.is_file() else None
            if size is not None and not 0 <= info.offset <= info.offset + info.length <= size:
                raise ValueError
            room[index.fqn] = room.get(index.fqn, 0) + info.length
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise TypeError
            num_bytes = math.prod(entry.size) * entry.properties.dtype.itemsize
            if any(extent < 0 for extent in entry.size) or num_bytes > room.get(key, 0):
                raise ValueError


class HonestWriter(FileSystemWriter):
    """A :class:`FileSystemWriter` that reports the disk's own error.

    On a full disk, torch's archive writer fails a second time while closing and hides that error.
    """

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Write; raise the :class:`OSError` behind a failure if there is one."""
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(*cause.args) from None
