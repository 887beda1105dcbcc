"""Hugging Face model folders: open one for reading, write one whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelFileError
from .config import ModelConfig
from .hf_config import from_hf
from .safetensors_file import SafetensorsFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensor_name(parameter: str) -> str:
    """Return the Hugging Face name of one of the decoder's own (non-expert) tensors."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def expert_tensor_name(layer: int, expert: int, part: str) -> str:
    """Return the Hugging Face name of an expert's ``gate``, ``up`` or ``down`` matrix."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


class ModelFolder:
    """An open model folder: its configuration and its tensors by Hugging Face name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = self._read_json("config.json")
        self.config: ModelConfig = from_hf(self.values)
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        for name in self._file_names():
            file = SafetensorsFile(path / name)
            self._files[name] = file
            self._file_of.update(dict.fromkeys(file.entries, file))
        self._check_index()

    def locate(self, name: str) -> SafetensorsFile:
        """Return the file that holds tensor ``name``."""
        if name not in self._file_of:
            raise ModelFileError(
                f"{self.path} has no tensor {name!r}, which its config.json asks for; "
                "copy the folder again."
            )
        return self._file_of[name]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def check_experts(self) -> None:
        """Raise :class:`ModelFileError` unless every expert's matrices are there and fit."""
        config, moe = self.config, self.config.moe
        if moe is None:
            return
        wide, narrow = (moe.d_expert, config.d_model), (config.d_model, moe.d_expert)
        for layer in filter(config.is_moe, range(config.num_layers)):
            for expert in range(moe.num_experts):
                for part, shape in (("gate", wide), ("up", wide), ("down", narrow)):
                    name = expert_tensor_name(layer, expert, part)
                    self.locate(name).check_shape(name, shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` with tensor ``name``."""
        try:
            self.locate(name).read_into(name, out)
        except OSError as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{name} could not be read: {error}.") from None

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelFileError(
                f"{self.path / name} cannot be read ({error.strerror}); "
                "give a Hugging Face model folder."
            ) from None
        except ValueError:
            raise ModelFileError(f"{self.path / name} is not JSON; copy it again.") from None
        if not isinstance(values, dict):
            raise ModelFileError(f"{self.path / name} is not a JSON object; copy it again.")
        return values

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).exists():
            self._index: dict[str, str] = self._read_json(INDEX).get("weight_map", {})
            names = sorted(set(self._index.values()))
            for name in names:
                if Path(name).name != name:
                    raise ModelFileError(f"{INDEX} names {name!r}, which is not in the folder.")
            return names
        self._index = {}
        if not (self.path / WEIGHTS).exists():
            hint = ""
            if any(self.path.glob("*.bin")):
                hint = " Pickled .bin weights are not read; convert them to safetensors."
            raise ModelFileError(f"{self.path} has no {WEIGHTS} and no {INDEX}.{hint}")
        return [WEIGHTS]

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if name not in self._files[file].entries:
                raise ModelFileError(f"{INDEX} says {name} is in {file}, but it is not.")


def write_model_folder(
    target: Path,
    config_values: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    save_tokenizer: Callable[[Path], None],
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a folder under a hidden name and rename it when it is complete.

    ``tensors`` may be a generator; at most one shard is in memory beside what it yields.
    """
    if target.exists():
        raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_json(temporary / "config.json", config_values)
        eos = config_values["eos_token_id"]
        _write_json(
            temporary / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos}
        )
        save_tokenizer(temporary)
        _write_shards(temporary, tensors, max_shard_bytes)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(target)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _fill_shards(tensors, limit):
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _fill_shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
