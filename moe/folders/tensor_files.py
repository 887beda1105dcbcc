"""The tensors of a model folder by name, in all of its safetensors files."""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ...errors import ModelFileError
from .compressed_tensors import PackedFormat, names_of, packed_name, read_plain
from .extents import Place
from .group_sparse_format import StoredFormat
from .json_file import read_json
from .packed_schemes import PackedSchemes
from .safetensors_file import SafetensorsFile, TensorEntry

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFiles:
    """All safetensors files of a folder, open; reading is thread-safe."""

    def __init__(self, folder: Path, packed: StoredFormat | PackedSchemes | None = None) -> None:
        self.folder = folder
        self.packed = packed
        """How matrices in few bits are stored; None if there are none."""
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        try:
            index = self._read_index()
            for name in sorted(set(index.values())) or [WEIGHTS]:
                file = SafetensorsFile(folder / name)
                self._files[name] = file
                self._add(file, index)
            for name, file_name in index.items():
                if name not in self._files[file_name].entries:
                    raise ModelFileError(f"{INDEX} says {name} is in {file_name}, but it is not.")
                self._file_of[name] = self._files[file_name]
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def entry(self, name: str) -> TensorEntry:
        """Return type and shape of tensor ``name``."""
        return self._locate(name).entries[name]

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`ModelFileError` when tensor ``name`` is missing or has another shape."""
        self._locate(name).check_shape(name, shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` with tensor ``name``; ``OSError`` where its bytes cannot be read."""
        self._locate(name).read_into(name, out)

    def check_matrix(self, name: str, shape: tuple[int, ...]) -> None:
        """Do what :meth:`check_shape` does, for a tensor that may be a quantized matrix."""
        packed = self._packing(name)
        if packed is None:
            self.check_shape(name, shape)
            return
        for stored, (_, stored_shape) in packed.stored(name, *shape).items():
            self.check_shape(stored, stored_shape)

    def stored_names(self, name: str) -> set[str]:
        """Return the names of the stored tensors of ``name``, which may be a quantized matrix."""
        return {name} if self._packing(name) is None else set(names_of(name))

    def read_matrix(self, name: str, out: Tensor) -> None:
        """Do what :meth:`read_into` does, and dequantize a quantized matrix."""
        packed = self._packing(name)
        if packed is None:
            self.read_into(name, out)
        else:
            read_plain(self.read_into, name, packed, out)

    def _packing(self, name: str) -> PackedFormat | None:
        """Return how matrix ``name``, of no routed expert, is rounded; None if it is not."""
        if self.packed is None or packed_name(name) not in self:
            return None
        packed = self.packed.of(name)
        return packed if isinstance(packed, PackedFormat) else None

    def read_part(self, name: str, index: int, out: Tensor) -> None:
        """Fill ``out`` with element ``index`` of the first dimension of tensor ``name``."""
        self._locate(name).read_part(name, index, out)

    def place(self, name: str, shape: tuple[int, ...]) -> Place:
        """Return where tensor ``name`` is.

        Raises :class:`ModelFileError` when it is missing or has another shape.
        """
        file = self._locate(name)
        file.check_shape(name, shape)
        return Place(file, file.entries[name])

    def place_of_part(self, name: str, index: int, shape: tuple[int, ...]) -> Place:
        """Return where element ``index`` of the first dimension of tensor ``name`` is."""
        file = self._locate(name)
        return Place(file, file.part_entry(name, index, shape))

    def open_direct(self) -> bool:
        """Prepare reads around the page cache; False where a file system offers none."""
        return all(file.reader.open_direct() for file in self._files.values())

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [file.path for file in self._files.values()]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _add(self, file: SafetensorsFile, index: dict[str, str]) -> None:
        """Register a file's tensors; if two files share a name, the index must decide."""
        for name in file.entries:
            other = self._file_of.get(name)
            if other is not None and name not in index:
                raise ModelFileError(
                    f"{name} is in {other.path.name} and in {file.path.name}, and {INDEX} does not "
                    "say which holds; copy the folder again."
                )
            self._file_of[name] = file

    def _locate(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise ModelFileError(
                f"{self.folder} has no tensor {name!r}, which its config.json asks for; "
                "copy the folder again."
            )
        return self._file_of[name]

    def _read_index(self) -> dict[str, str]:
        """Return which file each tensor is in; empty if there is only one file."""
        if not (self.folder / INDEX).exists():
            if not (self.folder / WEIGHTS).exists():
                raise ModelFileError(
                    f"{self.folder} has no {WEIGHTS} and no {INDEX}; {self._remedy()}."
                )
            return {}
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{INDEX} has no weight_map; copy the folder again.")
        for name in weight_map.values():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\.safetensors", name):
                raise ModelFileError(
                    f"{INDEX} names {name!r}, which is not in the folder; copy the folder again."
                )
        return weight_map

    def _remedy(self) -> str:
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            return (
                "pickled weights can run code and are not read, so convert them with "
                "transformers' save_pretrained on a machine that trusts them"
            )
        return "copy the folder again"
