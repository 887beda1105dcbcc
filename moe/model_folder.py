"""Open a Hugging Face model folder: its configuration and its tensors."""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelFileError
from .config import ModelConfig
from .hf_config import from_hf
from .safetensors_file import SafetensorsFile
from .tensor_names import expected_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ModelFolder:
    """An open model folder: its configuration and its tensors by Hugging Face name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = self._read_json("config.json")
        self.config: ModelConfig = from_hf(self.values)
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        try:
            for name in self._file_names():
                file = SafetensorsFile(path / name)
                self._files[name] = file
                self._file_of.update(dict.fromkeys(file.entries, file))
            self._check_index()
        except BaseException:
            self.close()
            raise

    def locate(self, name: str) -> SafetensorsFile:
        """Return the file that holds tensor ``name``."""
        if name not in self._file_of:
            raise ModelFileError(
                f"{self.path} has no tensor {name!r}, which its config.json asks for; "
                "copy the folder again."
            )
        return self._file_of[name]

    def check(self) -> None:
        """Raise :class:`ModelFileError` unless all tensors are there and fit the configuration.

        Reads headers only, and stops at the first tensor that is missing, so that an absurd
        configuration costs nothing.
        """
        for name, shape in expected_tensors(self.config):
            self.locate(name).check_shape(name, shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` with tensor ``name``."""
        try:
            self.locate(name).read_into(name, out)
        except OSError as error:
            raise ModelFileError(f"{name} could not be read: {error}.") from None

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def read_optional(self, name: str) -> dict[str, Any]:
        """Read another JSON file of the folder; an absent one reads as empty."""
        return self._read_json(name) if (self.path / name).exists() else {}

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelFileError(
                f"{self.path / name} cannot be read ({error.strerror}); "
                "give a Hugging Face model folder."
            ) from None
        except (ValueError, RecursionError):
            raise ModelFileError(f"{self.path / name} is not JSON; copy it again.") from None
        if not isinstance(values, dict):
            raise ModelFileError(f"{self.path / name} is not a JSON object; copy it again.")
        return values

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).exists():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelFileError(f"{INDEX} has no weight_map; copy the folder again.")
            self._index: dict[str, str] = weight_map
            for name in weight_map.values():
                if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\.safetensors", name):
                    raise ModelFileError(f"{INDEX} names {name!r}, which is not in the folder.")
            return sorted(set(self._index.values()))
        self._index = {}
        if not (self.path / WEIGHTS).exists():
            remedy = "copy the folder again"
            if any(self.path.glob("*.bin")):
                remedy = "pickled .bin weights are not read, so convert them to safetensors"
            raise ModelFileError(f"{self.path} has no {WEIGHTS} and no {INDEX}; {remedy}.")
        return [WEIGHTS]

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if name not in self._files[file].entries:
                raise ModelFileError(f"{INDEX} says {name} is in {file}, but it is not.")
